use pt_dpo::{
    LossConfig, PairBatch, PairLogps, UnpairedBatch, completion_lengths, kl_estimate, ld_logps, preference_loss,
    preference_metrics, sum_logps, unpaired_loss, unpaired_metrics, wpo_weights,
};
use pt_tensor::io::SafetensorsReader;
use pt_tensor::{Device, Kind, Tensor};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// A run of `runs.json`.
#[derive(Deserialize)]
struct Run {
    name: String,
    /// `trl`, or `equation` where TRL has nothing.
    source: String,
    config: LossConfig,
}

struct Case {
    name: String,
    inputs: SafetensorsReader,
    expected: SafetensorsReader,
    runs: Vec<Run>,
    rtol: f64,
    atol: f64,
}

impl Case {
    fn open(name: &str) -> Self {
        let folder: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/dpo").join(name);
        let case_toml = std::fs::read_to_string(folder.join("case.toml")).unwrap();
        let number = |key: &str| -> f64 {
            let line = case_toml.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix('='));
            line.unwrap().trim().parse().unwrap()
        };
        Self {
            name: name.to_owned(),
            inputs: SafetensorsReader::open(folder.join("inputs.safetensors")).unwrap(),
            expected: SafetensorsReader::open(folder.join("expected.safetensors")).unwrap(),
            runs: serde_json::from_str(&std::fs::read_to_string(folder.join("runs.json")).unwrap()).unwrap(),
            rtol: number("rtol"),
            atol: number("atol"),
        }
    }

    fn input(&self, name: &str) -> Tensor {
        self.inputs.tensor(name, Device::Cpu).unwrap()
    }

    /// Ours is a number everywhere, and TRL's where TRL has one. In f32, `scale` times the tolerances.
    fn check(&self, run: &Run, what: &str, found: &Tensor, scale: f64) {
        let expected = self.expected.tensor(&format!("{}.{what}", run.name), Device::Cpu).unwrap();
        let place = format!("{}/{} ({}): {what}", self.name, run.name, run.source);
        let found = found.detach().to_kind(Kind::Double);
        assert_eq!(found.size(), expected.size(), "{place}");
        assert_eq!(found.isnan().any().int64_value(&[]), 0, "{place} is {found}");
        let error = (&found - &expected).abs() / (expected.abs() * self.rtol + self.atol);
        let worst = error.masked_select(&expected.isfinite()).max_or(0.0);
        assert!(worst <= scale, "{place} is off by {worst:.2} of what is allowed: {found}, expected {expected}");
    }
}

trait MaxOr {
    fn max_or(&self, empty: f64) -> f64;
}

impl MaxOr for Tensor {
    fn max_or(&self, empty: f64) -> f64 {
        if self.numel() == 0 { empty } else { self.max().double_value(&[]) }
    }
}

/// The scored tokens of the rows on one axis, and the row of each; as a packed batch has them.
fn pack(column: &Tensor, mask: &Tensor) -> (Tensor, Tensor) {
    let rows = Tensor::arange(mask.size()[0], (Kind::Int64, Device::Cpu)).unsqueeze(1).expand_as(mask);
    (column.masked_select(mask), rows.masked_select(mask))
}

fn check_pairs(name: &str, kind: Kind, scale: f64) {
    let case = Case::open(name);
    let mask = case.input("mask").to_kind(Kind::Bool);
    let num_rows = mask.size()[0];
    let chosen: Vec<i64> = (0..num_rows / 2).collect();
    let rejected: Vec<i64> = (num_rows / 2..num_rows).collect();
    assert!(case.runs.len() > 50);
    for run in &case.runs {
        let leaf = case.input("policy").to_kind(kind).set_requires_grad(true);
        let (policy, ids) = pack(&leaf, &mask);
        let (reference, _) = pack(&case.input("reference").to_kind(kind), &mask);
        let pair_logps = |logprobs: &Tensor| match run.config.ld_alpha {
            Some(alpha) => ld_logps(logprobs, &ids, &chosen, &rejected, alpha).unwrap(),
            None => PairLogps::select(&sum_logps(logprobs, &ids, num_rows).unwrap(), &chosen, &rejected).unwrap(),
        };
        let select = |column: &Tensor, indices: &[i64]| column.index_select(0, &Tensor::from_slice(indices));
        let lengths = completion_lengths(&ids, num_rows).unwrap();
        let mut pairs = PairBatch::new(pair_logps(&policy))
            .with_reference(pair_logps(&reference))
            .with_lengths(select(&lengths, &chosen), select(&lengths, &rejected));
        if run.config.wpo {
            let (log_collision, _) = pack(&case.input("log_sum_squares").to_kind(kind), &mask);
            let weights = wpo_weights(&policy, &log_collision, &ids, num_rows).unwrap();
            pairs.wpo_weights = Some(select(&weights, &chosen) * select(&weights, &rejected));
        }
        let out = preference_loss(&run.config, &pairs).unwrap();
        let loss = out.losses.mean(kind);
        case.check(run, "loss", &loss, scale);
        if case.expected.shape(&format!("{}.losses", run.name)).is_some() {
            case.check(run, "losses", &out.losses, scale);
        }
        loss.backward();
        case.check(run, "grad", &leaf.grad(), scale);
        let metrics = preference_metrics(&out, &pairs.policy).map(|(_, value)| value);
        case.check(run, "metrics", &Tensor::from_slice(&metrics), scale);
    }
}

#[test]
fn losses_gradients_and_metrics_of_pairs_equal_those_of_trl() {
    check_pairs("pairs", Kind::Double, 1.0);
    check_pairs("pairs", Kind::Float, 20.0);
}

#[test]
fn losses_of_extreme_log_ratios_equal_those_of_trl_where_it_has_numbers() {
    check_pairs("extreme", Kind::Double, 1.0);
    check_pairs("extreme", Kind::Float, 20.0);
}

#[test]
fn losses_gradients_and_metrics_of_single_completions_equal_those_of_trl() {
    for name in ["unpaired", "unpaired_below"] {
        let case = Case::open(name);
        let mask = case.input("mask").to_kind(Kind::Bool);
        let kl = kl_estimate(&case.input("mismatched_policy"), &case.input("mismatched_reference")).unwrap();
        for run in &case.runs {
            let leaf = case.input("policy").set_requires_grad(true);
            let (policy, ids) = pack(&leaf, &mask);
            let sum = |logprobs: &Tensor| sum_logps(logprobs, &ids, mask.size()[0]).unwrap();
            let rows = UnpairedBatch {
                policy_logps: sum(&policy),
                reference_logps: sum(&pack(&case.input("reference"), &mask).0),
                is_desirable: case.input("is_desirable").to_kind(Kind::Bool),
                // TRL logs 0 for the loss that has none.
                kl: if run.name.starts_with("kto") { kl } else { 0.0 },
                weights: None,
            };
            let out = unpaired_loss(&run.config, &rows).unwrap();
            let loss = out.losses.mean(Kind::Double);
            case.check(run, "loss", &loss, 1.0);
            loss.backward();
            case.check(run, "grad", &leaf.grad(), 1.0);
            let metrics: Vec<f64> = unpaired_metrics(&out, &rows).into_iter().map(|(_, value)| value).collect();
            case.check(run, "metrics", &Tensor::from_slice(&metrics), 1.0);
        }
    }
}
