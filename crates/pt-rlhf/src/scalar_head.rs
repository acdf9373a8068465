//! A linear head that makes one number of a hidden state: a reward, or a value.

use crate::{Result, RlhfError};
use pt_tensor::{Device, Kind, Tensor, no_grad};

/// Name of the head's weight in a checkpoint and among trained parameters, as in `transformers`'
/// `ForSequenceClassification` models.
pub const SCORE_WEIGHT: &str = "score.weight";

/// r = w · h, without a bias: the head of `ForSequenceClassification` with one label.
///
/// The weight is an f32 leaf, `[1, hidden_size]`, whatever the model computes in. The same head gives a critic its
/// values.
///
/// # Example
/// ```
/// use pt_rlhf::ScalarHead;
/// use pt_tensor::Tensor;
/// let head = ScalarHead::from_tensor(&Tensor::from_slice(&[1f32, -2.0]).view([1, 2]))?;
/// let states = Tensor::from_slice(&[3f32, 1.0, 0.5, 0.5]).view([2, 2]);
/// assert_eq!(Vec::<f32>::try_from(head.forward(&states)?.detach()).unwrap(), [1.0, -0.5]);
/// # Ok::<(), pt_rlhf::RlhfError>(())
/// ```
#[derive(Debug)]
pub struct ScalarHead {
    /// `[1, hidden_size]`
    weight: Tensor,
}

impl ScalarHead {
    /// A head that starts normal with the deviation 1/√(hidden_size + 1), so that scores start of the order of 1
    /// (Stiennon et al. 2020, <https://arxiv.org/abs/2009.01325>, whose reward models those of InstructGPT follow;
    /// also in TRL's PPO examples). The draw is our own, of `seed` alone.
    ///
    /// # Errors
    /// [`RlhfError::Shape`] for a width below 1.
    pub fn new(hidden_size: i64, seed: u64, device: Device) -> Result<Self> {
        if hidden_size < 1 {
            return Err(RlhfError::Shape {
                what: "hidden_size",
                found: hidden_size.to_string(),
                expected: "at least 1".into(),
            });
        }
        let deviation = 1.0 / ((hidden_size + 1) as f64).sqrt();
        let values: Vec<f32> = normal(seed, hidden_size as usize).map(|z| (z * deviation) as f32).collect();
        Self::from_tensor(&Tensor::from_slice(&values).view([1, hidden_size]).to_device(device))
    }

    /// A head with a copy of this weight, `[1, hidden_size]` of any kind.
    ///
    /// # Errors
    /// [`RlhfError::Shape`] for another shape.
    pub fn from_tensor(weight: &Tensor) -> Result<Self> {
        match weight.size()[..] {
            [1, hidden_size] if hidden_size > 0 => {}
            _ => return Err(RlhfError::shape(SCORE_WEIGHT, weight, "[1, hidden_size]")),
        }
        let weight = no_grad(|| weight.detach().to_kind(Kind::Float).copy()).set_requires_grad(true);
        Ok(Self { weight })
    }

    /// The same head: both train one weight.
    #[must_use]
    pub fn shared(&self) -> Self {
        Self { weight: self.weight.shallow_clone() }
    }

    /// The weight, `[1, hidden_size]`, f32.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Width of the hidden states that it reads.
    pub fn hidden_size(&self) -> i64 {
        self.weight.size()[1]
    }

    /// Numbers of hidden states: `[n, hidden_size]` of any kind → `[n]`, f32; what is narrower is widened first.
    ///
    /// # Errors
    /// [`RlhfError::Shape`] for states of another width.
    pub fn forward(&self, states: &Tensor) -> Result<Tensor> {
        match states.size()[..] {
            [_, width] if width == self.hidden_size() => {}
            _ => return Err(RlhfError::shape("states", states, format!("[n, {}]", self.hidden_size()))),
        }
        let scores = states.to_kind(Kind::Float).matmul(&self.weight.tr()); // [n, 1]
        Ok(scores.squeeze_dim(1)) // [n]
    }

    /// The trained leaf by its name.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        vec![(SCORE_WEIGHT.into(), self.weight.shallow_clone())]
    }
}

/// Standard normal numbers of a seed: SplitMix64 (Steele et al. 2014), then Box and Muller 1958.
fn normal(seed: u64, count: usize) -> impl Iterator<Item = f64> {
    let mut state = seed;
    let mut unit = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        // 53 random bits in (0, 1]: the logarithm is finite.
        ((z >> 11) + 1) as f64 / (1u64 << 53) as f64
    };
    (0..count).map(move |_| (-2.0 * unit().ln()).sqrt() * (std::f64::consts::TAU * unit()).cos())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn states(values: &[f32], width: i64) -> Tensor {
        Tensor::from_slice(values).view([-1, width])
    }

    #[test]
    fn a_score_is_the_product_with_the_weight_and_trains_it() {
        let head = ScalarHead::from_tensor(&states(&[1.0, -2.0, 0.5], 3)).unwrap();
        let scores = head.forward(&states(&[1.0, 1.0, 4.0, 0.0, 1.0, 0.0], 3)).unwrap();
        assert_eq!(Vec::<f32>::try_from(scores.detach()).unwrap(), [1.0, -2.0]);
        scores.sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(head.weight().grad().view(-1)).unwrap(), [1.0, 2.0, 4.0]);
    }

    #[test]
    fn states_in_bf16_give_f32_scores_and_other_widths_are_refused() {
        let head = ScalarHead::from_tensor(&states(&[1.0, 0.0], 2)).unwrap();
        let narrow = states(&[0.5, 3.0], 2).to_kind(Kind::BFloat16);
        let scores = head.forward(&narrow).unwrap();
        assert_eq!((scores.kind(), scores.double_value(&[0])), (Kind::Float, 0.5));
        let error = head.forward(&states(&[1.0, 2.0, 3.0], 3)).unwrap_err().to_string();
        assert_eq!(error, "`states` is [1, 3] of Float, expected [n, 2]");
        let error = ScalarHead::from_tensor(&states(&[1.0, 2.0, 3.0, 4.0], 2)).unwrap_err().to_string();
        assert_eq!(error, "`score.weight` is [2, 2] of Float, expected [1, hidden_size]");
        assert!(ScalarHead::new(0, 0, Device::Cpu).is_err());
    }

    #[test]
    fn a_new_head_is_normal_and_of_its_seed_alone() {
        let head = |seed| ScalarHead::new(4095, seed, Device::Cpu).unwrap();
        let weight = head(3).weight().detach() * 64.0; // of deviation 1
        let (mean, deviation) = (weight.mean(Kind::Double), weight.std(true));
        assert!(mean.double_value(&[]).abs() < 0.06 && (deviation.double_value(&[]) - 1.0).abs() < 0.05, "{weight}");
        assert!(head(3).weight().equal(head(3).weight()) && !head(3).weight().equal(head(4).weight()));
        assert!(head(3).weight().requires_grad());
    }

    #[test]
    fn a_shared_head_trains_the_same_weight() {
        let head = ScalarHead::new(4, 0, Device::Cpu).unwrap();
        let other = head.shared();
        let _ = no_grad(|| head.weight().shallow_clone().fill_(2.0));
        assert_eq!(other.weight().double_value(&[0, 3]), 2.0);
        assert_eq!(other.parameters()[0].0, "score.weight");
    }
}
