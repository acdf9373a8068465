//! Several updates made one, with weights: task arithmetic, concatenation, SVD, TIES and DARE.

use super::factors::Factors;
use super::start::svd;
use super::{LoraAdapter, LoraConfig};
use crate::base::Base;
use crate::config::Modules;
use crate::init::uniform;
use crate::{PeftError, Result};
use pt_tensor::{Kind, Tensor, no_grad};
use std::fmt;
use std::str::FromStr;

/// What is summed, and what becomes of the sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sum {
    /// The factors A and B, each with √(weight · scaling): small, and exact for one adapter alone. All have one rank.
    Factors,
    /// None: the factors stand side by side, which is exact; the rank is the sum of theirs.
    Concatenation,
    /// The products B·A; the sum is cut to a rank by its singular values, to the largest of theirs where none is given.
    Products {
        /// Rank of the result.
        rank: Option<i64>,
    },
}

/// Which values of an update stay; the rest become zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pruning {
    /// The largest ones (TIES, Yadav et al. 2023, <https://arxiv.org/abs/2306.01708>).
    Magnitude {
        /// Share that stays, over 0 and at most 1.
        density: f64,
    },
    /// Random ones, divided by the share (DARE, Yu et al. 2024, <https://arxiv.org/abs/2311.03099>).
    Random {
        /// Share that stays, over 0 and at most 1.
        density: f64,
        /// Of the choice.
        seed: u64,
    },
}

/// How the sign of a value is elected, so that only updates which agree with it are averaged (TIES).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MajoritySign {
    /// By the sum of the values.
    Total,
    /// By how many there are of either.
    Frequency,
}

/// How adapters become one; PEFT's `combination_type` is a name for each, read by [`FromStr`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Combination {
    /// What is summed.
    pub sum: Sum,
    /// What is cut off before.
    pub pruning: Option<Pruning>,
    /// Whether signs are elected, and how.
    pub sign: Option<MajoritySign>,
}

/// Names of combinations, as PEFT has them.
const NAMES: [&str; 11] = [
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
];

impl FromStr for Combination {
    type Err = String;

    /// One of PEFT's names, with a density of a half where it prunes, seed 0 and signs by their total.
    fn from_str(name: &str) -> std::result::Result<Self, String> {
        if !NAMES.contains(&name) {
            return Err(format!("`{name}` is no combination, expected one of {}", NAMES.join(", ")));
        }
        let (kind, sum) = match name.strip_suffix("_svd") {
            Some(kind) => (kind, Sum::Products { rank: None }),
            None if name == "svd" => (name, Sum::Products { rank: None }),
            None if name == "cat" => (name, Sum::Concatenation),
            None => (name, Sum::Factors),
        };
        let density = 0.5;
        let pruning = match kind {
            "ties" | "magnitude_prune" => Some(Pruning::Magnitude { density }),
            "dare_linear" | "dare_ties" => Some(Pruning::Random { density, seed: 0 }),
            _ => None,
        };
        Ok(Self { sum, pruning, sign: kind.ends_with("ties").then_some(MajoritySign::Total) })
    }
}

impl Combination {
    fn validate(&self) -> Result<()> {
        let mut faults = Vec::new();
        if let Some(Pruning::Magnitude { density } | Pruning::Random { density, .. }) = self.pruning
            && !(density > 0.0 && density <= 1.0)
        {
            faults.push(format!("`density` is {density}, expected over 0 and at most 1"));
        }
        if let Sum::Products { rank: Some(rank) } = self.sum
            && rank < 1
        {
            faults.push(format!("`rank` is {rank}, expected at least 1"));
        }
        if self.sum == Sum::Concatenation && (self.pruning.is_some() || self.sign.is_some()) {
            faults.push("a concatenation sums nothing, expected no pruning and no signs".into());
        }
        if faults.is_empty() { Ok(()) } else { Err(PeftError::Config { faults }) }
    }

    /// The weighted sum of tensors of one shape; `name` makes the random choice this tensor's own.
    fn total(&self, tensors: &[Tensor], weights: &[f64], name: &str) -> Tensor {
        let pruned: Vec<Tensor> =
            tensors.iter().enumerate().map(|(i, tensor)| self.pruned(tensor, &format!("{name}.{i}"))).collect();
        let pruned = Tensor::stack(&pruned, 0);
        let mut shape = vec![1; pruned.dim()];
        shape[0] = weights.len() as i64;
        let weights =
            Tensor::from_slice(weights).to_kind(Kind::Float).to_device(pruned.device()).view(shape.as_slice());
        let weighted = &pruned * weights;
        let first = [0i64].as_slice();
        let Some(sign) = self.sign else { return weighted.sum_dim_intlist(first, false, Kind::Float) };
        let votes = match sign {
            MajoritySign::Total => pruned.sum_dim_intlist(first, false, Kind::Float),
            MajoritySign::Frequency => pruned.sign().sum_dim_intlist(first, false, Kind::Float),
        };
        // A tie is positive; what was cut off has no sign and agrees with none.
        let elected = votes.ge(0.0).to_kind(Kind::Float) * 2.0 - 1.0;
        let agrees = pruned.sign().eq_tensor(&elected).to_kind(Kind::Float);
        let sum = (weighted * &agrees).sum_dim_intlist(first, false, Kind::Float);
        sum / agrees.sum_dim_intlist(first, false, Kind::Float).clamp_min(1.0)
    }

    fn pruned(&self, tensor: &Tensor, name: &str) -> Tensor {
        match self.pruning {
            None => tensor.shallow_clone(),
            Some(Pruning::Magnitude { density } | Pruning::Random { density, .. }) if density >= 1.0 => {
                tensor.shallow_clone()
            }
            Some(Pruning::Magnitude { density }) => {
                let flat = tensor.reshape(-1);
                let count = (density * flat.numel() as f64) as i64;
                let (_, kept) = flat.abs().topk(count, -1, true, false);
                let values = flat.gather(0, &kept, false);
                flat.zeros_like().scatter(0, &kept, &values).view_as(tensor)
            }
            Some(Pruning::Random { density, seed }) => {
                let draws = Tensor::from_slice(&uniform(seed, name, tensor.numel(), 1.0)).to_device(tensor.device());
                let kept = draws.lt(2.0 * density - 1.0).to_kind(Kind::Float).view_as(tensor);
                tensor * kept / density
            }
        }
    }
}

impl fmt::Display for Combination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = NAMES.iter().find(|name| {
            Self::from_str(name).is_ok_and(|known| {
                std::mem::discriminant(&known.sum) == std::mem::discriminant(&self.sum)
                    && known.pruning.map(|p| std::mem::discriminant(&p))
                        == self.pruning.map(|p| std::mem::discriminant(&p))
                    && known.sign.is_some() == self.sign.is_some()
            })
        });
        f.write_str(found.copied().unwrap_or("a combination without a name"))
    }
}

impl LoraAdapter {
    /// One plain adapter out of several with weights, as PEFT's `add_weighted_adapter` makes it: on every layer that
    /// one of them is on, with scaling 1. Weights may be negative, which takes an update away.
    ///
    /// # Errors
    /// [`PeftError::Config`] for settings out of range; [`PeftError::State`] without adapters, for one with more than
    /// plain updates of linear layers (DoRA, embeddings, biases, modules trained whole), and for ranks that differ where
    /// factors are summed.
    pub fn combined<'a>(base: impl Into<Base<'a>>, parts: &[(&Self, f64)], how: Combination) -> Result<Self> {
        how.validate()?;
        let base = base.into();
        for (index, (adapter, weight)) in parts.iter().enumerate() {
            let place = format!("adapter {} of {}", index + 1, parts.len());
            adapter.check_plain(&place)?;
            if !weight.is_finite() {
                let fault = format!("the weight of {place} is {weight}, expected a number");
                return Err(PeftError::Config { faults: vec![fault] });
            }
        }
        let mut paths: Vec<String> = Vec::new();
        for layer in &base.layers {
            if parts.iter().any(|(adapter, _)| adapter.factors_of(layer).is_some()) {
                paths.push(layer.path.clone());
            }
        }
        if paths.is_empty() {
            return Err(PeftError::State("there is no update to combine: expected adapters on this model".into()));
        }
        let largest = |adapter: &Self| adapter.factors.iter().flatten().map(Factors::rank).max().unwrap_or(0);
        let rank = match how.sum {
            Sum::Concatenation => parts.iter().map(|(adapter, _)| largest(adapter)).sum(),
            Sum::Products { rank: Some(rank) } => rank,
            Sum::Factors | Sum::Products { rank: None } => {
                parts.iter().map(|(adapter, _)| largest(adapter)).max().unwrap_or(0)
            }
        };
        let (target_modules, base_model_name_or_path) =
            (Modules::Names(paths), parts.iter().find_map(|(part, _)| part.config.base_model_name_or_path.clone()));
        let config = LoraConfig {
            rank,
            lora_alpha: rank as f64,
            target_modules,
            base_model_name_or_path,
            ..LoraConfig::default()
        };
        let combined = Self::new(config, base, 0)?;
        no_grad(|| {
            for own in combined.factors.iter().flatten() {
                let updates: Vec<(&Factors, f64)> = parts
                    .iter()
                    .filter_map(|(adapter, weight)| {
                        let found = adapter.factors.iter().flatten().find(|factors| factors.path == own.path);
                        found.map(|factors| (factors, *weight * factors.scaling))
                    })
                    .collect();
                own.set(&how.factors(&updates, rank, &own.path)?);
            }
            Ok(combined)
        })
    }

    /// That it has plain updates of linear layers and nothing else.
    fn check_plain(&self, place: &str) -> Result<()> {
        let mut more = Vec::new();
        let mut has = |is_there: bool, what: &'static str| more.extend(is_there.then_some(what));
        has(self.embedding.is_some() || self.tokens.is_some(), "trained embeddings");
        has(self.saved.iter().next().is_some(), "modules trained whole");
        has(self.biases.named().next().is_some(), "trained biases");
        let factors = || self.factors.iter().flatten();
        has(factors().any(|factors| factors.magnitude.is_some()), "DoRA's magnitudes");
        has(factors().any(|factors| factors.bias.is_some()), "biases after B");
        has(
            factors().any(|factors| factors.part.is_some()),
            "a start from the model's weights (save and load it first)",
        );
        if more.is_empty() {
            return Ok(());
        }
        Err(PeftError::State(format!(
            "only plain updates of linear layers can be combined; {place} has {}",
            more.join(", ")
        )))
    }
}

impl Combination {
    /// A `[rank, in_features]` and B `[out_features, rank]` out of updates with their weight · scaling.
    fn factors(&self, updates: &[(&Factors, f64)], rank: i64, path: &str) -> Result<(Tensor, Tensor)> {
        let a: Vec<Tensor> = updates.iter().map(|(factors, _)| factors.a.detach()).collect();
        let b: Vec<Tensor> = updates.iter().map(|(factors, _)| factors.b.detach()).collect();
        let weights: Vec<f64> = updates.iter().map(|(_, weight)| *weight).collect();
        let scaled_b = || b.iter().zip(&weights).map(|(b, weight)| b * *weight).collect::<Vec<_>>();
        Ok(match self.sum {
            Sum::Factors => {
                if let Some((other, _)) = updates.iter().find(|(factors, _)| factors.rank() != rank) {
                    return Err(PeftError::State(format!(
                        "`{path}` has an update of rank {} beside one of rank {rank}: factors of one rank are summed; \
                         `cat` and `svd` take any",
                        other.rank()
                    )));
                }
                // The sign goes to one side only, or it would cancel.
                let roots: Vec<f64> = weights.iter().map(|weight| weight.abs().sqrt()).collect();
                let signed: Vec<f64> =
                    weights.iter().zip(&roots).map(|(weight, root)| root.copysign(*weight)).collect();
                (self.total(&a, &signed, &format!("{path}.A")), self.total(&b, &roots, &format!("{path}.B")))
            }
            Sum::Concatenation => padded(Tensor::cat(&a, 0), Tensor::cat(&scaled_b(), 1), rank),
            Sum::Products { .. } if self.pruning.is_none() && self.sign.is_none() => {
                // The sum is [wB ..]·[A ..]: its singular values are those of the small matrix between two
                // orthogonal ones.
                let (left, right) = (Tensor::cat(&scaled_b(), 1), Tensor::cat(&a, 0).tr());
                let ((q_left, r_left), (q_right, r_right)) =
                    (Tensor::f_linalg_qr(&left, "reduced")?, Tensor::f_linalg_qr(&right, "reduced")?);
                let (b, a) = cut(&r_left.matmul(&r_right.tr()), rank)?;
                padded(a.matmul(&q_right.tr()), q_left.matmul(&b), rank)
            }
            Sum::Products { .. } => {
                let scaling: Vec<f64> = updates.iter().map(|(factors, _)| factors.scaling).collect();
                let products: Vec<Tensor> =
                    b.iter().zip(&a).zip(&scaling).map(|((b, a), scaling)| b.matmul(a) * *scaling).collect();
                let weights: Vec<f64> =
                    weights.iter().zip(&scaling).map(|(weight, scaling)| weight / scaling).collect();
                let (b, a) = cut(&self.total(&products, &weights, path), rank)?;
                padded(a, b, rank)
            }
        })
    }
}

/// U·S and Vᵀ of the `rank` largest singular values.
fn cut(matrix: &Tensor, rank: i64) -> Result<(Tensor, Tensor)> {
    let (u, s, vh) = svd(matrix)?;
    let count = rank.min(s.size()[0]);
    Ok((u.narrow(1, 0, count) * s.narrow(0, 0, count), vh.narrow(0, 0, count)))
}

/// Factors of fewer than `rank` rows with zeros added.
fn padded(a: Tensor, b: Tensor, rank: i64) -> (Tensor, Tensor) {
    let missing = rank - a.size()[0];
    if missing == 0 {
        return (a, b);
    }
    let zeros = |size: [i64; 2]| Tensor::zeros(size, (Kind::Float, a.device()));
    let (more_a, more_b) = (zeros([missing, a.size()[1]]), zeros([b.size()[0], missing]));
    (Tensor::cat(&[a, more_a], 0), Tensor::cat(&[b, more_b], 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_peft_is_read_and_written() {
        for name in NAMES {
            assert_eq!(Combination::from_str(name).unwrap().to_string(), name);
        }
        assert!(Combination::from_str("tie").unwrap_err().contains("expected one of linear, cat"));
    }

    #[test]
    fn random_pruning_keeps_the_mean_and_magnitude_pruning_the_largest() {
        let values = Tensor::from_slice(&[3f32, -1.0, 0.5, -4.0]);
        let how = |pruning| Combination { sum: Sum::Factors, pruning: Some(pruning), sign: None };
        let kept = how(Pruning::Magnitude { density: 0.5 }).pruned(&values, "x");
        assert_eq!(Vec::<f32>::try_from(kept).unwrap(), [3.0, 0.0, 0.0, -4.0]);
        let ones = Tensor::ones([20_000], (Kind::Float, pt_tensor::Device::Cpu));
        let kept = how(Pruning::Random { density: 0.25, seed: 3 }).pruned(&ones, "x");
        let share = kept.ne(0.0).to_kind(Kind::Float).mean(None).double_value(&[]);
        let mean = kept.mean(None).double_value(&[]);
        assert!((share - 0.25).abs() < 0.02 && (mean - 1.0).abs() < 0.08, "{share} {mean}");
    }

    #[test]
    fn signs_are_elected_and_the_others_left_out_of_the_mean() {
        let tensors = [[1f32, -1.0, 2.0], [3.0, 2.0, 0.0], [-1.0, 2.0, 0.0]].map(|row| Tensor::from_slice(&row));
        let sum = |sign| {
            let how = Combination { sum: Sum::Factors, pruning: None, sign: Some(sign) };
            Vec::<f32>::try_from(how.total(&tensors, &[1.0, 1.0, 1.0], "x")).unwrap()
        };
        assert_eq!(sum(MajoritySign::Total), [2.0, 2.0, 2.0]);
        assert_eq!(sum(MajoritySign::Frequency), [2.0, 2.0, 2.0]);
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let how =
            Combination { sum: Sum::Concatenation, pruning: Some(Pruning::Magnitude { density: 0.0 }), sign: None };
        let text = how.validate().unwrap_err().to_string();
        assert!(text.contains("`density` is 0") && text.contains("a concatenation sums nothing"), "{text}");
    }
}
