//! Numbers for a log, under TRL's names.

use crate::loss::{LossOutput, PairLogps, UnpairedBatch, UnpairedOutput};
use pt_tensor::{Kind, Tensor};

fn mean(column: &Tensor) -> f64 {
    column.detach().to_kind(Kind::Double).mean(Kind::Double).double_value(&[])
}

/// Means over pairs: `rewards/chosen`, `rewards/rejected`, `rewards/accuracies` (the share of pairs whose chosen reward is the greater),
/// `rewards/margins`, `logps/chosen`, `logps/rejected` (summed log-probs, nats; TRL's SimPO and ORPO log them a token).
///
/// NaN without pairs.
pub fn preference_metrics(output: &LossOutput, policy: &PairLogps) -> [(&'static str, f64); 6] {
    let LossOutput { chosen_rewards, rejected_rewards, .. } = output;
    [
        ("rewards/chosen", mean(chosen_rewards)),
        ("rewards/rejected", mean(rejected_rewards)),
        ("rewards/accuracies", mean(&chosen_rewards.gt_tensor(rejected_rewards))),
        ("rewards/margins", mean(&(chosen_rewards - rejected_rewards))),
        ("logps/chosen", mean(&policy.chosen_logps)),
        ("logps/rejected", mean(&policy.rejected_logps)),
    ]
}

/// The same of single completions, the desirable ones as chosen: `kl`, then rewards and log-probs of each side that has rows, and `rewards/margins`
/// (of the two means) where both have.
pub fn unpaired_metrics(output: &UnpairedOutput, rows: &UnpairedBatch) -> Vec<(&'static str, f64)> {
    let side = |is_in: &Tensor, names: [&'static str; 2]| -> Vec<(&'static str, f64)> {
        if is_in.any().int64_value(&[]) == 0 {
            return Vec::new();
        }
        let mean_of = |column: &Tensor| mean(&column.detach().masked_select(is_in));
        vec![(names[0], mean_of(&output.rewards)), (names[1], mean_of(&rows.policy_logps))]
    };
    let chosen = side(&rows.is_desirable, ["rewards/chosen", "logps/chosen"]);
    let rejected = side(&rows.is_desirable.logical_not(), ["rewards/rejected", "logps/rejected"]);
    let margin =
        chosen.first().zip(rejected.first()).map(|(chosen, rejected)| ("rewards/margins", chosen.1 - rejected.1));
    [vec![("kl", rows.kl)], chosen, rejected, margin.into_iter().collect()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Loss, LossConfig, PairBatch, preference_loss, unpaired_loss};

    /// Log-ratios of 1 and −1 over 0 and 2: one pair of two the right way round.
    #[test]
    fn pairs_are_averaged_under_trls_names() {
        let policy = PairLogps::from_slices(&[-4.0, -6.0], &[-5.0, -3.0]).unwrap();
        let reference = PairLogps::from_slices(&[-5.0, -5.0], &[-5.0, -5.0]).unwrap();
        let pairs = PairBatch::new(policy).with_reference(reference);
        let output = preference_loss(&LossConfig { beta: 0.5, ..LossConfig::default() }, &pairs).unwrap();
        assert_eq!(
            preference_metrics(&output, &pairs.policy),
            [
                ("rewards/chosen", 0.0),
                ("rewards/rejected", 0.5),
                ("rewards/accuracies", 0.5),
                ("rewards/margins", -0.5),
                ("logps/chosen", -5.0),
                ("logps/rejected", -4.0),
            ]
        );
    }

    #[test]
    fn single_completions_are_averaged_by_label() {
        let mut rows = UnpairedBatch {
            policy_logps: Tensor::from_slice(&[-4f32, -6.0, -2.0]),
            reference_logps: Tensor::from_slice(&[-5f32, -5.0, -5.0]),
            is_desirable: Tensor::from_slice(&[true, false, true]),
            kl: 0.25,
            weights: None,
        };
        let config = LossConfig { beta: 0.5, ..LossConfig::of(Loss::Kto) };
        let metrics = |rows: &UnpairedBatch| unpaired_metrics(&unpaired_loss(&config, rows).unwrap(), rows);
        assert_eq!(
            metrics(&rows),
            [
                ("kl", 0.25),
                ("rewards/chosen", 1.0),
                ("logps/chosen", -3.0),
                ("rewards/rejected", -0.5),
                ("logps/rejected", -6.0),
                ("rewards/margins", 1.5),
            ]
        );
        rows.is_desirable = Tensor::from_slice(&[true; 3]);
        assert_eq!(metrics(&rows).len(), 3);
    }
}
