//! The elements of CPU tensors as slices, for kernels that know no tensors.

use pt_quant::Bf16;
use tch::{Device, Kind, Tensor};

use crate::Result;

/// Panics unless the elements lie in this process's memory, one after the other, aligned, and are of `kind`: our bug, not the user's.
fn check<T>(tensor: &Tensor, kind: Kind) {
    assert!(
        tensor.device() == Device::Cpu && tensor.kind() == kind && tensor.is_contiguous(),
        "a contiguous CPU tensor of {kind:?} is needed here, not {tensor:?}"
    );
    assert!(tensor.data_ptr().cast::<T>().is_aligned(), "elements of a tensor are aligned");
}

/// A CPU tensor that nothing else holds yet, so that its elements can be written as a slice.
pub(crate) struct NewTensor(Tensor);

impl NewTensor {
    /// Of any contents.
    pub(crate) fn empty(size: &[i64], kind: Kind) -> Self {
        Self(Tensor::empty(size, (kind, Device::Cpu)))
    }

    /// Takes over the values of another tensor, broadcast to this one's size.
    pub(crate) fn copy_from(&mut self, values: &Tensor) -> Result<()> {
        self.0.f_copy_(values)?;
        Ok(())
    }

    /// The tensor, which others may hold from now on.
    pub(crate) fn into_tensor(self) -> Tensor {
        self.0
    }
}

macro_rules! slices {
    ($shared:ident, $exclusive:ident, $type:ty, $kind:expr) => {
        #[doc = concat!("The elements of a contiguous CPU tensor of ", stringify!($kind), ".")]
        pub(crate) fn $shared(tensor: &Tensor) -> &[$type] {
            if tensor.numel() == 0 {
                return &[];
            }
            check::<$type>(tensor, $kind);
            // SAFETY: the checked tensor holds `numel` elements of that type from `data_ptr` on, aligned to them, and keeps its storage
            // while it is borrowed. Nothing writes to it meanwhile: the kernels that read it write to `NewTensor`s alone.
            unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<$type>(), tensor.numel()) }
        }

        impl NewTensor {
            #[doc = concat!("Its elements, of ", stringify!($kind), ", to be written.")]
            pub(crate) fn $exclusive(&mut self) -> &mut [$type] {
                if self.0.numel() == 0 {
                    return &mut [];
                }
                check::<$type>(&self.0, $kind);
                // SAFETY: as above; no other tensor shares the storage, since `NewTensor` has made it and gives it out only by value.
                unsafe { std::slice::from_raw_parts_mut(self.0.data_ptr().cast::<$type>(), self.0.numel()) }
            }
        }
    };
}

slices!(f32s, f32s_mut, f32, Kind::Float);
slices!(u8s, u8s_mut, u8, Kind::Uint8);
slices!(bf16s, bf16s_mut, Bf16, Kind::BFloat16);
