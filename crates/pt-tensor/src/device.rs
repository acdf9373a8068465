//! Devices and number formats by name.

use crate::{Result, TensorError};
use serde::{Deserialize, Serialize};
use tch::{Cuda, Device, Kind};

/// Reads `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; `auto` takes CUDA, then MPS, then the CPU.
///
/// # Errors
/// [`TensorError::Argument`] for another name, or a device that this libtorch does not see.
pub fn parse_device(name: &str) -> Result<Device> {
    load_cuda();
    let device = match name {
        "auto" if Cuda::is_available() => Device::Cuda(0),
        "auto" if tch::utils::has_mps() => Device::Mps,
        "auto" | "cpu" => Device::Cpu,
        "cuda" => Device::Cuda(0),
        "mps" => Device::Mps,
        other => match other.strip_prefix("cuda:").and_then(|index| index.parse().ok()) {
            Some(index) => Device::Cuda(index),
            None => return Err(TensorError::argument("device", other, "auto, cpu, cuda, cuda:N or mps")),
        },
    };
    match device {
        Device::Cuda(index) if index >= usize::try_from(Cuda::device_count()).unwrap_or(0) => {
            Err(TensorError::argument("device", name, "a device that this libtorch sees (it sees no such CUDA device)"))
        }
        Device::Mps if !tch::utils::has_mps() => {
            Err(TensorError::argument("device", name, "a device that this libtorch sees (it has no MPS)"))
        }
        device => Ok(device),
    }
}

/// The CPU prefix links no CUDA library; where a full PyTorch is on the library path, loading it registers CUDA.
fn load_cuda() {
    #[cfg(target_os = "linux")]
    {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| {
            // SAFETY: dlopen takes a NUL-terminated name and runs the library's initialisers, which is what
            // registers its kernels; a missing library gives a null handle, which we ignore.
            unsafe { libc::dlopen(c"libtorch_cuda.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        });
    }
}

/// Number format of weights and activations in a config file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeKind {
    /// bf16 where the device computes in it natively, f32 otherwise.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl ComputeKind {
    /// The libtorch kind on a device.
    pub fn kind(self, device: Device) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
            Self::F16 => Kind::Half,
            Self::Auto if device.is_cuda() || has_native_bf16() => Kind::BFloat16,
            Self::Auto => Kind::Float,
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_native_bf16() -> bool {
    std::arch::is_x86_feature_detected!("avx512bf16")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_native_bf16() -> bool {
    false
}

/// Reads `auto`, `f32`, `bf16` or `f16` (and their long names).
///
/// # Errors
/// [`TensorError::Argument`] for another name.
pub fn parse_kind(name: &str) -> Result<ComputeKind> {
    Ok(match name {
        "auto" => ComputeKind::Auto,
        "f32" | "float32" => ComputeKind::F32,
        "bf16" | "bfloat16" => ComputeKind::Bf16,
        "f16" | "float16" => ComputeKind::F16,
        other => return Err(TensorError::argument("dtype", other, "auto, f32, bf16 or f16")),
    })
}

/// Peak resident memory of this process in bytes, where the system tells.
pub fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Ends the process at once, without tearing down what is static.
///
/// For interrupts: libtorch's threads may be at work on another thread's behalf, and `std::process::exit` would take away
/// under them what they compute with, which ends in a segmentation fault. Nothing is flushed that is not written yet.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` has no preconditions; it runs no destructors and does not return.
    unsafe { libc::_exit(code) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_are_read_and_others_refused() {
        assert_eq!(parse_device("cpu").unwrap(), Device::Cpu);
        assert!(parse_device("gpu").unwrap_err().to_string().contains("expected auto, cpu, cuda"));
        assert!(parse_device("cuda:99").is_err());
        assert!(parse_device("cuda:18446744073709551615").is_err(), "an index that is -1 as a signed number");
    }

    #[test]
    fn kinds_are_read_by_both_names() {
        assert_eq!(parse_kind("bfloat16").unwrap(), ComputeKind::Bf16);
        assert_eq!(parse_kind("f32").unwrap().kind(Device::Cpu), Kind::Float);
        assert!(parse_kind("int8").is_err());
    }
}
