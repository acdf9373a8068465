//! Telling a delta's base from other models of the same shape.

use crate::Result;
use crate::base::Base;
use pt_tensor::{Kind, Tensor, no_grad};
use std::fmt;

/// Values of each tensor that are looked at, evenly spaced: any fine-tuning moves nearly all.
const SAMPLES: i64 = 4096;

/// CRC-32C of samples of a base's parameters, rounded to bf16, so that it is the same whether the model was loaded in f32
/// or bf16. Sums of tensors are joined by exclusive or: their order does not matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Fingerprint {
    /// Of weights that get signs.
    signed: u32,
    /// Of embeddings and norms, which 4-bit bases have, too.
    plain: u32,
}

impl Fingerprint {
    /// Takes in a weight that gets signs, `[out_features, in_features]`.
    pub(super) fn add_signed(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        self.signed ^= checksum(name, tensor)?;
        Ok(())
    }

    /// Takes in an embedding or a norm.
    pub(super) fn add_plain(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        self.plain ^= checksum(name, tensor)?;
        Ok(())
    }

    /// Whether `base` is the model that this was taken of, as far as can be seen: weights in 4 bits are not what they
    /// were, and f16 rounds otherwise.
    pub(super) fn fits(&self, base: &Base<'_>) -> Result<bool> {
        if base.kind() == Kind::Half {
            return Ok(true);
        }
        let mut found = Self::default();
        for (name, tensor) in base.plain_parameters() {
            found.add_plain(&name, &tensor)?;
        }
        if base.is_model() && found.plain != self.plain {
            return Ok(false);
        }
        let layers = || base.layers.iter().enumerate().filter(|(position, _)| Some(*position) != base.output);
        if layers().any(|(_, layer)| layer.weight.as_nf4().is_some()) {
            return Ok(true);
        }
        for (_, layer) in layers() {
            found.add_signed(&format!("{}.weight", layer.path), &layer.weight.dense()?)?;
        }
        Ok(found.signed == self.signed)
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let (signed, plain) = text.split_once('-')?;
        let number = |text: &str| u32::from_str_radix(text, 16).ok().filter(|_| text.len() == 8);
        Some(Self { signed: number(signed)?, plain: number(plain)? })
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}-{:08x}", self.signed, self.plain)
    }
}

fn checksum(name: &str, tensor: &Tensor) -> Result<u32> {
    let flat = no_grad(|| tensor.detach().f_reshape([-1]))?;
    let (len, count) = (flat.size()[0], flat.size()[0].min(SAMPLES));
    let places: Vec<i64> = (0..count).map(|index| index * len / count.max(1)).collect();
    let places = Tensor::f_from_slice(&places)?.f_to_device(flat.device())?;
    let samples = flat.f_index_select(0, &places)?.f_to_kind(Kind::BFloat16)?.f_to_kind(Kind::Float)?;
    // bf16 is the upper half of f32.
    let samples = Vec::<f32>::try_from(&samples.to_device(pt_tensor::Device::Cpu))?;
    let bytes = samples.into_iter().flat_map(|value| value.to_bits().to_le_bytes());
    Ok(scattered(crc32c::crc32c(&name.bytes().chain(bytes).collect::<Vec<u8>>())))
}

/// MurmurHash3's finalizer (Appleby 2011). Checksums are linear: joined as they are, those of two tensors that changed
/// names would give the same.
fn scattered(mut sum: u32) -> u32 {
    sum = (sum ^ (sum >> 16)).wrapping_mul(0x85eb_ca6b);
    sum = (sum ^ (sum >> 13)).wrapping_mul(0xc2b2_ae35);
    sum ^ (sum >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pt_tensor::Device;

    #[test]
    fn a_fingerprint_is_of_values_names_and_no_order() {
        let tensor = |seed: f64| (Tensor::arange(300, (Kind::Float, Device::Cpu)) * seed).sin().view([30, 10]);
        let of = |tensors: &[(&str, &Tensor)]| {
            let mut sum = Fingerprint::default();
            tensors.iter().for_each(|(name, tensor)| sum.add_signed(name, tensor).unwrap());
            sum
        };
        let (a, b) = (tensor(1.3), tensor(0.7));
        assert_eq!(of(&[("a", &a), ("b", &b)]), of(&[("b", &b), ("a", &a.to_kind(Kind::BFloat16))]));
        assert_ne!(of(&[("a", &a), ("b", &b)]), of(&[("a", &b), ("b", &a)]));
        assert_ne!(of(&[("a", &a)]), of(&[("a", &(&a + 0.01))]));
        let sum = of(&[("a", &a)]);
        assert_eq!(Fingerprint::parse(&sum.to_string()), Some(sum));
        assert_eq!(Fingerprint::parse("12-34"), None);
    }
}
