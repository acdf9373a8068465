//! The elements of CPU tensors as slices, for kernels that know no tensors.

use pt_quant::Bf16;
use tch::{Device, Kind, Tensor};

/// Panics unless the elements lie in this process's memory, one after the other, and are of `kind`: our bug, not the user's.
fn check(tensor: &Tensor, kind: Kind) {
    assert!(
        tensor.device() == Device::Cpu && tensor.kind() == kind && tensor.is_contiguous(),
        "a contiguous CPU tensor of {kind:?} is needed here, not {tensor:?}"
    );
}

macro_rules! slices {
    ($shared:ident, $exclusive:ident, $type:ty, $kind:expr) => {
        #[doc = concat!("The elements of a contiguous CPU tensor of ", stringify!($kind), ".")]
        pub(crate) fn $shared(tensor: &Tensor) -> &[$type] {
            check(tensor, $kind);
            if tensor.numel() == 0 {
                return &[];
            }
            // SAFETY: the checked tensor holds `numel` elements of that type from `data_ptr` on, aligned to them, and keeps its storage
            // while it is borrowed. Nothing writes to it meanwhile: kernels get `&mut` only of tensors made for them.
            unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<$type>(), tensor.numel()) }
        }

        #[doc = concat!("The elements of a contiguous CPU tensor of ", stringify!($kind), " that nothing else holds, to be written.")]
        #[allow(dead_code)]
        pub(crate) fn $exclusive(tensor: &mut Tensor) -> &mut [$type] {
            check(tensor, $kind);
            if tensor.numel() == 0 {
                return &mut [];
            }
            // SAFETY: as above; the caller has just made the tensor, so no other tensor shares its storage.
            unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<$type>(), tensor.numel()) }
        }
    };
}

slices!(f32s, f32s_mut, f32, Kind::Float);
slices!(bf16s, bf16s_mut, Bf16, Kind::BFloat16);
