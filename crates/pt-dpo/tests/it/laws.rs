use pt_dpo::{
    FDivergence, Loss, LossConfig, PairBatch, PairLogps, UnpairedBatch, preference_loss, preference_metrics,
    unpaired_loss,
};
use pt_tensor::{Kind, Tensor};

/// Six pairs, f64: policy and reference log-probs that differ by a few nats each way, no two by the same (sorting has no
/// slope there), and lengths.
const POLICY: [[f64; 6]; 2] = [[-12.1, -7.3, -21.0, -3.2, -9.7, -15.4], [-11.2, -9.5, -18.7, -6.6, -10.3, -14.1]];
const REFERENCE: [[f64; 6]; 2] = [[-13.0, -6.1, -20.2, -4.8, -11.5, -15.9], [-10.6, -8.8, -21.3, -5.1, -9.2, -14.9]];
const LENGTHS: [[i64; 6]; 2] = [[5, 3, 9, 2, 4, 6], [4, 4, 7, 3, 5, 6]];

fn pair_logps(values: [[f64; 6]; 2], kind: Kind) -> PairLogps {
    let [chosen_logps, rejected_logps] = values.map(|side| Tensor::from_slice(&side).to_kind(kind));
    PairLogps { chosen_logps, rejected_logps }
}

fn batch(policy: PairLogps, reference: PairLogps) -> PairBatch {
    let [chosen, rejected] = LENGTHS.map(|side| Tensor::from_slice(&side));
    PairBatch::new(policy).with_reference(reference).with_lengths(chosen, rejected)
}

/// Every loss on pairs, with settings that make its terms matter, and with every divergence where it takes one.
fn configs() -> Vec<LossConfig> {
    let mut configs = Vec::new();
    for loss in Loss::ALL.into_iter().filter(|loss| !loss.is_unpaired()) {
        let plain = LossConfig {
            beta: 0.4,
            label_smoothing: if loss.smooths_labels() { 0.1 } else { 0.0 },
            f_alpha_divergence_coef: 0.3,
            nll_weight: Some(0.2),
            length_penalty: if loss.takes_margin() { 0.05 } else { 0.0 },
            ..LossConfig::of(loss)
        };
        let is_on_difference = loss.is_on_difference();
        for f_divergence in FDivergence::ALL.into_iter().take(if is_on_difference { 4 } else { 1 }) {
            configs.push(LossConfig { f_divergence, ..plain.clone() });
        }
    }
    configs
}

fn total(config: &LossConfig, pairs: &PairBatch) -> Tensor {
    // Unequal factors, so that a gradient that went to the wrong pair would show.
    let upstream = Tensor::arange(6, (Kind::Double, pt_tensor::Device::Cpu)) + 1.0;
    (preference_loss(config, pairs).unwrap().losses * upstream).sum(Kind::Double)
}

#[test]
fn gradients_equal_finite_differences() {
    for config in configs() {
        let reference = pair_logps(REFERENCE, Kind::Double);
        let leaves = pair_logps(POLICY, Kind::Double);
        let _ = leaves.chosen_logps.set_requires_grad(true);
        let _ = leaves.rejected_logps.set_requires_grad(true);
        let grads = [leaves.chosen_logps.shallow_clone(), leaves.rejected_logps.shallow_clone()];
        total(&config, &batch(leaves, reference.shallow_clone())).backward();
        for (side, leaf) in grads.iter().enumerate() {
            for pair in 0..6 {
                let value = |step: f64| {
                    let mut moved = POLICY;
                    moved[side][pair] += step;
                    total(&config, &batch(pair_logps(moved, Kind::Double), reference.shallow_clone())).double_value(&[])
                };
                let difference = (value(1e-5) - value(-1e-5)) / 2e-5;
                let found = if leaf.grad().defined() { leaf.grad().double_value(&[pair as i64]) } else { 0.0 };
                assert!(
                    (found - difference).abs() < 1e-6 * difference.abs().max(1.0),
                    "{config:?}: {found} is not {difference}"
                );
            }
        }
    }
}

#[test]
fn unpaired_gradients_equal_finite_differences() {
    for loss in [Loss::Kto, Loss::ApoZeroUnpaired] {
        let config = LossConfig { beta: 0.4, desirable_weight: 0.7, undesirable_weight: 1.3, ..LossConfig::of(loss) };
        let rows = |policy: [f64; 6]| UnpairedBatch {
            policy_logps: Tensor::from_slice(&policy).set_requires_grad(true),
            reference_logps: Tensor::from_slice(&REFERENCE[0]),
            is_desirable: Tensor::from_slice(&[true, false, true, true, false, false]),
            kl: 0.8,
            weights: None,
        };
        let value = |policy: [f64; 6]| unpaired_loss(&config, &rows(policy)).unwrap().losses.sum(Kind::Double);
        let leaf = rows(POLICY[0]);
        unpaired_loss(&config, &leaf).unwrap().losses.sum(Kind::Double).backward();
        for row in 0..6 {
            let moved = |step: f64| {
                let mut policy = POLICY[0];
                policy[row] += step;
                value(policy).double_value(&[])
            };
            let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((leaf.policy_logps.grad().double_value(&[row as i64]) - difference).abs() < 1e-7);
        }
    }
}

/// What a policy that has not moved pays, worked out from the equations at β = 0.25.
#[test]
fn a_policy_equal_to_its_reference_pays_what_the_equations_say() {
    let ln_2 = 2f64.ln();
    for loss in Loss::ALL.into_iter().filter(|loss| loss.needs_reference() && !loss.is_unpaired()) {
        let expected = match loss {
            Loss::Sigmoid | Loss::SigmoidNorm | Loss::Robust | Loss::Aot => ln_2,
            Loss::Hinge | Loss::ApoZero | Loss::ApoDown => 1.0,
            // The lead asked for is 1/(2β) = 2 nats, of which there is none.
            Loss::Ipo | Loss::IpoNorm => 4.0,
            Loss::SppoHard => 8.0,
            // ln(1/2) against labels that are right nine times in ten.
            Loss::ExoPair => -ln_2 - 0.5 * (0.9f64 * 0.1).ln(),
            Loss::NcaPair | Loss::BcoPair => 2.0 * ln_2,
            Loss::Discopop => 0.5 * (ln_2 + 1.0),
            Loss::AotUnpaired => ln_2,
            other => panic!("{other:?} has no expected value"),
        };
        let config = LossConfig {
            beta: 0.25,
            label_smoothing: if loss.smooths_labels() { 0.1 } else { 0.0 },
            ..LossConfig::of(loss)
        };
        let logps = pair_logps(POLICY, Kind::Double);
        let out = preference_loss(&config, &batch(logps.shallow_clone(), logps)).unwrap();
        let error = (out.losses - expected).abs().max().double_value(&[]);
        assert!(error < 1e-12, "{loss:?} is off by {error}");
        assert_eq!(out.chosen_rewards.abs().max().double_value(&[]), 0.0);
    }
}

#[test]
fn extreme_log_ratios_give_no_nan_in_value_or_gradient() {
    // The chosen side far up, far down, neither; against the same of the rejected one.
    let far = 1e4;
    let reference = [[-10100.0, -100.0, -100.0, -10100.0, -10100.0, -100.0]; 2];
    let policy = [
        [reference[0][0] + far, -100.0 - far, -100.0, reference[0][3] + far, reference[0][4], -100.0 - far],
        [reference[1][0] + far, -100.0, -100.0 - far, reference[1][3], reference[1][4] + far, -100.0 - far],
    ];
    for kind in [Kind::Float, Kind::Double] {
        for mut config in configs() {
            for (beta, f_alpha_divergence_coef) in [(0.1, 0.3), (1.0, 3.0)] {
                config = LossConfig { beta, f_alpha_divergence_coef, ..config };
                let leaves = pair_logps(policy, kind);
                let _ = leaves.chosen_logps.set_requires_grad(true);
                let _ = leaves.rejected_logps.set_requires_grad(true);
                let clones = [leaves.chosen_logps.shallow_clone(), leaves.rejected_logps.shallow_clone()];
                let pairs = batch(leaves, pair_logps(reference, kind));
                let out = preference_loss(&config, &pairs).unwrap();
                assert_eq!(out.losses.isnan().any().int64_value(&[]), 0, "{config:?}: {}", out.losses);
                let metrics = preference_metrics(&out, &pairs.policy);
                assert!(metrics.iter().all(|(_, value)| value.is_finite()), "{metrics:?}");
                out.losses.mean(kind).backward();
                // The `sft` loss does not look at the rejected side.
                for leaf in clones.into_iter().filter(|leaf| leaf.grad().defined()) {
                    assert_eq!(leaf.grad().isnan().any().int64_value(&[]), 0, "{config:?}: {}", leaf.grad());
                }
            }
        }
    }
}

#[test]
fn extreme_log_ratios_of_single_completions_give_no_nan() {
    for kind in [Kind::Float, Kind::Double] {
        for (loss, kl, beta) in
            [Loss::Kto, Loss::ApoZeroUnpaired].into_iter().flat_map(|l| [(l, 0.0, 0.1), (l, 1e4, 1.0)])
        {
            let config = LossConfig { beta, ..LossConfig::of(loss) };
            let policy =
                Tensor::from_slice(&[-100f64, -10100.0, -100.0, -10100.0]).to_kind(kind).set_requires_grad(true);
            let rows = UnpairedBatch {
                policy_logps: policy.shallow_clone(),
                reference_logps: Tensor::from_slice(&[-10100f64, -100.0, -10100.0, -100.0]).to_kind(kind),
                is_desirable: Tensor::from_slice(&[true, true, false, false]),
                kl,
                weights: None,
            };
            let out = unpaired_loss(&config, &rows).unwrap();
            out.losses.sum(kind).backward();
            for values in [&out.losses, &out.rewards, &policy.grad()] {
                assert_eq!(values.isfinite().all().int64_value(&[]), 1, "{loss:?} {kl}: {values}");
            }
            // All won or all lost, but where the point of reference is as far up itself: half.
            let expected = if loss == Loss::Kto && kl > 0.0 { [0.5, 1.0, 0.5, 0.0] } else { [0.0, 1.0, 1.0, 0.0] };
            let found = Vec::<f64>::try_from(out.losses.detach().to_kind(Kind::Double)).unwrap();
            assert!(found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-6), "{found:?}");
        }
    }
}

#[test]
fn a_pairs_loss_does_not_depend_on_the_others_unless_the_loss_sorts() {
    for config in configs() {
        let nll_free = LossConfig { nll_weight: Some(0.0), ..config };
        if nll_free.loss_type.iter().any(|loss| matches!(loss, Loss::Aot | Loss::AotUnpaired | Loss::Sft)) {
            continue;
        }
        let whole = batch(pair_logps(POLICY, Kind::Double), pair_logps(REFERENCE, Kind::Double));
        let whole = preference_loss(&nll_free, &whole).unwrap().losses;
        let part = |logps: PairLogps| PairLogps {
            chosen_logps: logps.chosen_logps.narrow(0, 2, 1),
            rejected_logps: logps.rejected_logps.narrow(0, 2, 1),
        };
        let alone = PairBatch::new(part(pair_logps(POLICY, Kind::Double)))
            .with_reference(part(pair_logps(REFERENCE, Kind::Double)))
            .with_lengths(Tensor::from_slice(&[9i64]), Tensor::from_slice(&[7i64]));
        let alone = preference_loss(&nll_free, &alone).unwrap().losses;
        assert_eq!(alone.double_value(&[0]), whole.double_value(&[2]), "{nll_free:?}");
    }
}
