//! Where the moments of an optimizer live.

use std::ffi::{c_char, c_int, c_void};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use memmap2::MmapRaw;
use tch::{Device, Kind, Tensor};

use crate::autograd::check;
use crate::{Result, TensorError};

unsafe extern "C" {
    fn pt_tensor_over(
        data: *mut c_void,
        size: *const i64,
        num_axes: usize,
        is_bytes: c_int,
        owner: *mut c_void,
        drop: unsafe extern "C" fn(*mut c_void),
        out: *mut *mut c_void,
    ) -> *mut c_char;
}

/// Where new states are made.
#[derive(Debug)]
pub(super) enum Place {
    /// Beside the parameters.
    Device,
    /// In a file that the operating system pages.
    File(PagedFile),
    /// In page-locked memory of the host, which a device copies from and to at full speed while it computes.
    Pinned,
}

impl Place {
    /// Zeros of `kind` (f32 or u8) for the state `what` of a parameter on `device`.
    pub(super) fn zeros(&mut self, what: &str, size: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
        let is_of_no_memory = |error: &TensorError| {
            let text = error.to_string();
            text.contains("can't allocate memory") || text.contains("out of memory")
        };
        let made = match self {
            Self::File(file) => return file.zeros(size, kind),
            Self::Device => Tensor::f_zeros(size, (kind, device)).map_err(TensorError::from),
            Self::Pinned => Tensor::f_zeros(size, (kind, Device::Cpu))
                .and_then(|zeros| if device.is_cuda() { zeros.f_pin_memory(device) } else { Ok(zeros) })
                .map_err(TensorError::from),
        };
        made.map_err(|error| match is_of_no_memory(&error) {
            true => TensorError::OutOfMemory {
                what: format!("the optimizer state of `{what}`"),
                bytes: size.iter().product::<i64>() as usize * kind.elt_size_in_bytes(),
            },
            false => error,
        })
    }
}

/// A file of a given size in memory, zeros at first, from which tensors are cut.
///
/// It has no name from the start, so that nothing is left behind however the process ends, and its blocks are allocated before it is written
/// to: a disk that is full is an error here and not a fault later. What is not in use the system writes out and drops when memory is short; on
/// a file system in memory (tmpfs) it cannot.
#[derive(Debug)]
pub(super) struct PagedFile {
    map: Arc<MmapRaw>,
    used: usize,
}

/// What each tensor's place is a multiple of: a cache line.
const ALIGNMENT: usize = 64;

impl PagedFile {
    /// A file in `folder` for tensors of so many bytes.
    pub(super) fn new(folder: &Path, sizes: impl Iterator<Item = usize>) -> Result<Self> {
        let len: usize = sizes.map(|size| size.next_multiple_of(ALIGNMENT)).sum();
        let failed = |source| TensorError::Write { path: folder.join("(optimizer state)"), source };
        let file = tempfile::tempfile_in(folder).map_err(failed)?;
        // A mapping of nothing is refused by the system.
        allocate(&file, len.max(ALIGNMENT)).map_err(failed)?;
        let map = MmapRaw::map_raw(&file).map_err(failed)?;
        Ok(Self { map: Arc::new(map), used: 0 })
    }

    /// The next of the tensors that the file was made for.
    fn zeros(&mut self, size: &[i64], kind: Kind) -> Result<Tensor> {
        let start = self.used;
        let len = size.iter().product::<i64>() as usize * kind.elt_size_in_bytes();
        if !matches!(kind, Kind::Uint8 | Kind::Float) || len > self.map.len() - start {
            let found = format!("{size:?} of {kind:?} at byte {start}");
            return Err(TensorError::argument("paged tensor", found, "one that the file was made for"));
        }
        self.used = (start + len).next_multiple_of(ALIGNMENT).min(self.map.len());
        let owner = Arc::into_raw(self.map.clone()).cast_mut().cast();
        let mut out = std::ptr::null_mut();
        // SAFETY: the bytes [start, start + len) lie in the mapping, which the tensor keeps through `owner`, and no other tensor gets them; they
        // are aligned to more than their elements and written to through this pointer alone. The file has no name, so nobody cuts it.
        // `drop_map` takes `owner` for what it is, once.
        check(unsafe {
            let data = self.map.as_mut_ptr().add(start).cast();
            let is_bytes = c_int::from(kind == Kind::Uint8);
            pt_tensor_over(data, size.as_ptr(), size.len(), is_bytes, owner, drop_map, &mut out)
        })?;
        // SAFETY: on success the shim writes one tensor handle from `new`, which is ours from then on.
        Ok(unsafe { Tensor::from_ptr(out.cast()) })
    }
}

unsafe extern "C" fn drop_map(owner: *mut c_void) {
    // SAFETY: `owner` came from `Arc::into_raw` of this type, and the shim calls this once.
    drop(unsafe { Arc::from_raw(owner.cast::<MmapRaw>().cast_const()) });
}

/// Gives a file its length, and on Linux its blocks.
fn allocate(file: &File, len: usize) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        let len = libc::off_t::try_from(len).map_err(std::io::Error::other)?;
        // SAFETY: a call on a descriptor that is open for its length; it touches no memory of ours.
        match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, len) } {
            0 => Ok(()),
            code => Err(std::io::Error::from_raw_os_error(code)),
        }
    }
    #[cfg(not(target_os = "linux"))]
    file.set_len(len as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_of_a_file_are_zeros_apart_from_one_another_and_outlive_it() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = PagedFile::new(folder.path(), [12, 5, 0].into_iter()).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "it has no name");
        let mut floats = file.zeros(&[3], Kind::Float).unwrap();
        let mut bytes = file.zeros(&[5, 1], Kind::Uint8).unwrap();
        let nothing = file.zeros(&[0], Kind::Float).unwrap();
        assert_eq!(nothing.numel(), 0);
        assert!(file.zeros(&[1000], Kind::Float).unwrap_err().to_string().contains("at byte 128"));
        drop(file);
        let _ = floats.fill_(1.5);
        assert_eq!(Vec::<u8>::try_from(bytes.view(-1)).unwrap(), [0; 5]);
        let _ = bytes.fill_(7);
        assert_eq!(Vec::<f32>::try_from(&floats).unwrap(), [1.5; 3]);
    }

    #[test]
    fn a_disk_without_room_is_a_named_error() {
        let folder = tempfile::tempdir().unwrap();
        let error = PagedFile::new(folder.path(), [1usize << 60].into_iter()).unwrap_err();
        assert!(error.to_string().contains("(optimizer state)"), "{error}");
        assert!(PagedFile::new(&folder.path().join("missing"), [1].into_iter()).is_err());
    }
}
