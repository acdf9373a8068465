//! KTO: single completions, judged against where the policy stands on average.

use super::{check_column, wide};
use crate::config::{Loss, LossConfig};
use crate::error::{DpoError, Result};
use pt_tensor::{Kind, Tensor, no_grad};

/// What the losses of single completions are computed from. Columns are `[num_rows]`, log-probs summed over tokens, nats.
#[derive(Debug)]
pub struct UnpairedBatch {
    /// Log-probs under the policy; they carry the gradient.
    pub policy_logps: Tensor,
    /// Log-probs under the reference.
    pub reference_logps: Tensor,
    /// Which completions are desirable; bool.
    pub is_desirable: Tensor,
    /// z₀ as [`kl_estimate`] gives it; `apo_zero_unpaired` does not look at it.
    pub kl: f64,
    /// Factors on each row's loss.
    pub weights: Option<Tensor>,
}

/// What [`unpaired_loss`] returns, each `[num_rows]` f32 (f64 for f64 input).
#[derive(Debug)]
pub struct UnpairedOutput {
    /// The loss of each row, not averaged; differentiable.
    pub losses: Tensor,
    /// β·a; no gradient.
    pub rewards: Tensor,
}

/// KTO's z₀: how far the policy is from the reference, max(0, mean of a) over **mismatched** completions, each one a
/// completion of another row's prompt; in nats.
///
/// Over the whole optimizer step; TRL takes it over a micro-batch of each rank.
///
/// # Errors
/// [`DpoError::Shape`] unless both are `[num_rows]` of floats with at least one row.
pub fn kl_estimate(policy_logps: &Tensor, reference_logps: &Tensor) -> Result<f64> {
    let num_rows = policy_logps.size().first().copied().unwrap_or(0).max(1);
    check_column("policy_logps", policy_logps, num_rows)?;
    check_column("reference_logps", reference_logps, num_rows)?;
    let mean = no_grad(|| (wide(policy_logps) - wide(reference_logps)).mean(Kind::Double).double_value(&[]));
    Ok(mean.max(0.0))
}

/// The losses of single completions, added up by their weights, one value per row.
///
/// `kto`, Ethayarajh et al. 2024, <https://arxiv.org/abs/2402.01306>, Eq. 7, as a loss: λ_D·(1 − σ(β·(a − z₀))) for a desirable completion and
/// λ_U·(1 − σ(β·(z₀ − a))) for an undesirable one. `apo_zero_unpaired` is the same with z₀ = 0.
///
/// # Errors
/// [`DpoError::Config`] for a configuration with faults or for losses on pairs, [`DpoError::Shape`] for columns that do not fit.
pub fn unpaired_loss(config: &LossConfig, rows: &UnpairedBatch) -> Result<UnpairedOutput> {
    config.validate()?;
    if !config.is_unpaired() {
        let fault = format!("loss_type is `{}`, expected a loss on single completions", config.loss_type[0].name());
        return Err(DpoError::Config { faults: vec![fault] });
    }
    let num_rows = rows.policy_logps.size().first().copied().unwrap_or(-1);
    check_column("policy_logps", &rows.policy_logps, num_rows)?;
    check_column("reference_logps", &rows.reference_logps, num_rows)?;
    rows.weights.as_ref().map_or(Ok(()), |weights| check_column("weights", weights, num_rows))?;
    if rows.is_desirable.size() != [num_rows] || rows.is_desirable.kind() != Kind::Bool {
        return Err(DpoError::shape("is_desirable", &rows.is_desirable, format!("[{num_rows}] of Bool")));
    }
    if !rows.kl.is_finite() {
        let found = rows.kl.to_string();
        return Err(DpoError::Shape { what: "kl", found, expected: "a number".into() });
    }
    let log_ratios = wide(&rows.policy_logps) - wide(&rows.reference_logps.detach());
    let of_label = |desirable: f64, undesirable: f64| {
        let column = log_ratios.detach().full_like(undesirable);
        column.masked_fill(&rows.is_desirable, desirable)
    };
    let mut losses = log_ratios.zeros_like().detach();
    for (loss, weight) in config.weighted() {
        let kl = if loss == Loss::Kto { rows.kl } else { 0.0 };
        // 1 − σ(x) is σ(−x).
        losses += ((&log_ratios - kl) * of_label(-config.beta, config.beta)).sigmoid() * weight;
    }
    losses *= of_label(config.desirable_weight, config.undesirable_weight);
    if let Some(weights) = &rows.weights {
        losses *= wide(weights);
    }
    Ok(UnpairedOutput { losses, rewards: log_ratios.detach() * config.beta })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(kl: f64) -> UnpairedBatch {
        UnpairedBatch {
            policy_logps: Tensor::from_slice(&[-4f64, -4.0]).set_requires_grad(true),
            reference_logps: Tensor::from_slice(&[-5f64, -5.0]),
            is_desirable: Tensor::from_slice(&[true, false]),
            kl,
            weights: None,
        }
    }

    /// a = z₀ on both rows: each is half right, and pulled by a quarter of β towards its label.
    #[test]
    fn completions_at_the_point_of_reference_pay_half_their_weight() {
        let config =
            LossConfig { beta: 0.4, desirable_weight: 2.0, undesirable_weight: 3.0, ..LossConfig::of(Loss::Kto) };
        let rows = rows(1.0);
        let out = unpaired_loss(&config, &rows).unwrap();
        assert_eq!(Vec::<f64>::try_from(out.losses.detach()).unwrap(), [1.0, 1.5]);
        out.losses.sum(Kind::Double).backward();
        let slopes = Vec::<f64>::try_from(rows.policy_logps.grad()).unwrap();
        assert!((slopes[0] + 0.4 * 0.25 * 2.0).abs() < 1e-12 && (slopes[1] - 0.4 * 0.25 * 3.0).abs() < 1e-12);
        assert!(!out.rewards.requires_grad() && (out.rewards.double_value(&[0]) - 0.4).abs() < 1e-12);
    }

    /// Without a point of reference, a gain of ln 3 at β = 1 is three parts right.
    #[test]
    fn apo_zero_does_not_look_at_the_point_of_reference() {
        let mut rows = rows(7.0);
        rows.reference_logps = &rows.policy_logps - 3f64.ln();
        rows.weights = Some(Tensor::from_slice(&[1f64, 10.0]));
        let config = LossConfig { beta: 1.0, ..LossConfig::of(Loss::ApoZeroUnpaired) };
        let out = unpaired_loss(&config, &rows).unwrap();
        assert!((out.losses.double_value(&[0]) - 0.25).abs() < 1e-12);
        assert!((out.losses.double_value(&[1]) - 7.5).abs() < 1e-12);
    }

    #[test]
    fn the_point_of_reference_is_a_mean_and_never_negative() {
        let column = |values: &[f32]| Tensor::from_slice(values);
        assert_eq!(kl_estimate(&column(&[-1.0, -2.0]), &column(&[-2.0, -5.0])).unwrap(), 2.0);
        assert_eq!(kl_estimate(&column(&[-3.0]), &column(&[-2.0])).unwrap(), 0.0);
        assert!(kl_estimate(&column(&[]), &column(&[])).is_err());
    }

    #[test]
    fn inputs_that_do_not_fit_are_refused() {
        let error = |config: LossConfig, rows: &UnpairedBatch| unpaired_loss(&config, rows).unwrap_err().to_string();
        let kto = || LossConfig::of(Loss::Kto);
        assert!(error(LossConfig::default(), &rows(0.0)).contains("expected a loss on single completions"));
        assert!(error(kto(), &rows(f64::NAN)).contains("`kl` is NaN"));
        let labels = UnpairedBatch { is_desirable: Tensor::from_slice(&[1i64, 0]), ..rows(0.0) };
        assert!(error(kto(), &labels).contains("`is_desirable` is [2] of Int64, expected [2] of Bool"));
        let short = UnpairedBatch { reference_logps: Tensor::from_slice(&[0f64]), ..rows(0.0) };
        assert!(error(kto(), &short).contains("`reference_logps`"));
    }
}
