//! Instruction sets, found once at run time.

use alloc::string::ToString;
use core::fmt;
use core::str::FromStr;

use crate::QuantError;

/// An instruction set that kernels are written for. Each x86-64 level includes those before it.
///
/// Quantizing, packing and dequantizing give the same bits on all of them. Products differ in the order of
/// their sums, within the bound that each function states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust, on every processor.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C (Haswell, Zen and later).
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL, VBMI and VNNI (Ice Lake, Zen 4 and later).
    Avx512,
    /// `Avx512` with AVX-512 BF16 (Zen 4, Sapphire Rapids and later).
    Avx512Bf16,
    /// 64-bit Arm with NEON.
    Neon,
    /// `Neon` with the dot-product extension.
    NeonDot,
}

impl Isa {
    /// Every level there is, also those of other processors.
    pub const ALL: [Self; 6] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Neon, Self::NeonDot];

    /// Its name, as `PT_QUANT_ISA` takes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Neon => "neon",
            Self::NeonDot => "neondot",
        }
    }

    /// Whether this processor can run it. Without the feature `std`, what the compiler was told of the target.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => has_avx2(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => has_avx2() && has_avx512(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => has_avx2() && has_avx512() && has_avx512bf16(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => true,
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => has_dotprod(),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// The levels that this processor can run, the plainest first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// The best level that this processor can run.
    #[must_use]
    pub fn best() -> Self {
        Self::available().last().unwrap_or(Self::Scalar)
    }

    /// The level that [`Exec::new`](crate::Exec::new) takes: the best one, or what the environment variable
    /// `PT_QUANT_ISA` names (with the feature `std`; read once). A name that is unknown or not available here
    /// gives the best one: a variable must not stop a program. Use [`Exec::with_isa`](crate::Exec::with_isa) to get
    /// an error instead.
    #[must_use]
    pub fn detect() -> Self {
        #[cfg(feature = "std")]
        {
            static DETECTED: std::sync::OnceLock<Isa> = std::sync::OnceLock::new();
            *DETECTED.get_or_init(|| {
                let asked = std::env::var("PT_QUANT_ISA").ok().and_then(|name| name.parse::<Self>().ok());
                asked.filter(|isa| isa.is_available()).unwrap_or_else(Self::best)
            })
        }
        #[cfg(not(feature = "std"))]
        Self::best()
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = QuantError;

    fn from_str(name: &str) -> Result<Self, QuantError> {
        Self::ALL
            .into_iter()
            .find(|isa| isa.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| QuantError::UnknownIsa { found: name.to_string() })
    }
}

#[cfg(all(target_arch = "x86_64", feature = "std"))]
macro_rules! has {
    ($($feature:tt),*) => { true $(&& std::arch::is_x86_feature_detected!($feature))* };
}
#[cfg(all(target_arch = "x86_64", not(feature = "std")))]
macro_rules! has {
    ($($feature:tt),*) => { true $(&& cfg!(target_feature = $feature))* };
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    has!("avx2", "fma", "f16c")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    has!("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512vnni")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512bf16() -> bool {
    has!("avx512bf16")
}

#[cfg(target_arch = "aarch64")]
fn has_dotprod() -> bool {
    #[cfg(feature = "std")]
    return std::arch::is_aarch64_feature_detected!("dotprod");
    #[cfg(not(feature = "std"))]
    return cfg!(target_feature = "dotprod");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for isa in Isa::ALL {
            assert_eq!(isa.name().parse::<Isa>().unwrap(), isa);
        }
        assert!(matches!("sse9".parse::<Isa>(), Err(QuantError::UnknownIsa { .. })));
    }

    #[test]
    fn scalar_is_always_there_and_the_best_is_available() {
        assert!(Isa::available().any(|isa| isa == Isa::Scalar));
        assert!(Isa::best().is_available() && Isa::detect().is_available());
    }
}
