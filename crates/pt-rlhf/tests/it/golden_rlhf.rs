use pt_rlhf::{
    ImportanceLevel, KlEstimator, LossAverage, LossWindow, PolicyClip, ScaleRewards, ScorePlacement, Variance,
    at_tokens, clipped_losses, gae, group_advantages, leave_one_out_advantages, log_ratio, policy_losses,
    token_rewards, token_weights, value_lengths, value_losses, whiten,
};
use pt_tensor::io::SafetensorsReader;
use pt_tensor::{Device, Kind, Tensor};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// A run of `runs.json`.
#[derive(Deserialize)]
struct Run<C> {
    name: String,
    config: C,
}

struct Case {
    name: &'static str,
    folder: PathBuf,
    inputs: SafetensorsReader,
    expected: SafetensorsReader,
    rtol: f64,
    atol: f64,
}

impl Case {
    fn open(name: &'static str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/rlhf").join(name);
        let case_toml = std::fs::read_to_string(folder.join("case.toml")).unwrap();
        let number = |key: &str| -> f64 {
            let line = case_toml.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix('='));
            line.unwrap().trim().parse().unwrap()
        };
        let open = |file: &str| SafetensorsReader::open(folder.join(file)).unwrap();
        let (inputs, expected) = (open("inputs.safetensors"), open("expected.safetensors"));
        Self { name, inputs, expected, rtol: number("rtol"), atol: number("atol"), folder }
    }

    fn runs<C: DeserializeOwned>(&self) -> Vec<Run<C>> {
        serde_json::from_str(&std::fs::read_to_string(self.folder.join("runs.json")).unwrap()).unwrap()
    }

    /// f64.
    fn input(&self, name: &str) -> Tensor {
        self.inputs.tensor(name, Device::Cpu).unwrap()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        Vec::try_from(self.input(name).to_kind(Kind::Float)).unwrap()
    }

    fn lengths(&self) -> Vec<usize> {
        Vec::<i64>::try_from(self.input("lengths")).unwrap().into_iter().map(|length| length as usize).collect()
    }

    fn expects(&self, name: &str) -> bool {
        self.expected.shape(name).is_some()
    }

    fn check(&self, name: &str, found: &Tensor) {
        let expected = self.expected.tensor(name, Device::Cpu).unwrap();
        let found = found.detach().to_kind(Kind::Double);
        assert_eq!(found.size(), expected.size(), "{}/{name}", self.name);
        let error = (&found - &expected).abs() / (expected.abs() * self.rtol + self.atol);
        let worst = error.max().double_value(&[]);
        assert!(worst <= 1.0, "{}/{name} is off by {worst:.2} of what is allowed: {found}, not {expected}", self.name);
    }

    fn check_slice(&self, name: &str, found: &[f32]) {
        self.check(name, &Tensor::from_slice(found));
    }
}

#[derive(Deserialize)]
struct PpoRun {
    kl_estimator: KlEstimator,
    kl_coef: f64,
    whiten_rewards: bool,
    gamma: f64,
    lam: f64,
    cliprange: f64,
    cliprange_value: f64,
}

#[test]
fn rewards_advantages_and_losses_of_ppo_equal_those_of_trl_and_torchtune() {
    let case = Case::open("ppo");
    let (lengths, scores) = (case.lengths(), case.floats("scores"));
    // TRL's rows are as long as the longest response, which then has no entry after the end.
    let longest = lengths.iter().max().unwrap();
    let has_room: Vec<bool> = lengths.iter().map(|length| length < longest).collect();
    assert!(has_room.contains(&true) && has_room.contains(&false) && lengths.contains(&1));
    let value_lengths = value_lengths(&lengths, &has_room, ScorePlacement::AfterEnd);
    let values = case.floats("values");
    let runs = case.runs::<PpoRun>();
    assert!(runs.iter().any(|run| run.config.whiten_rewards) && runs.len() > 3);
    for Run { name, config } in runs {
        let named = |what: &str| format!("{name}.{what}");
        let kl = config.kl_estimator.values(&case.floats("logprobs"), &case.floats("reference"));
        let rewards_of =
            |placement| token_rewards(&kl, &lengths, &scores, config.kl_coef, placement, &has_room).unwrap();

        let mut rewards = rewards_of(ScorePlacement::AfterEnd);
        if config.whiten_rewards {
            whiten(&mut rewards, false, Variance::Unbiased);
        }
        case.check_slice(&named("rewards"), &rewards);
        let out = gae(&rewards, &values, &value_lengths, config.gamma, config.lam).unwrap();
        case.check_slice(&named("returns"), &out.returns);
        let of_tokens = at_tokens(&out.advantages, &lengths, &value_lengths).unwrap();
        let mut advantages = of_tokens.clone();
        whiten(&mut advantages, true, Variance::Unbiased);
        case.check_slice(&named("advantages"), &advantages);
        let mut with_mean = of_tokens;
        whiten(&mut with_mean, false, Variance::Unbiased);
        case.check_slice(&named("torchtune_whitened"), &with_mean);

        if !config.whiten_rewards {
            let rewards = rewards_of(ScorePlacement::LastToken);
            case.check_slice(&named("last_token_rewards"), &rewards);
            let values = at_tokens(&values, &lengths, &value_lengths).unwrap();
            let out = gae(&rewards, &values, &lengths, config.gamma, config.lam).unwrap();
            case.check_slice(&named("last_token_returns"), &out.returns);
        }

        let leaf = case.input("new_logprobs").set_requires_grad(true);
        let clip = PolicyClip { low: config.cliprange, high: config.cliprange, dual: None };
        let advantages = Tensor::from_slice(&advantages);
        let out = policy_losses(&leaf, &case.input("logprobs"), &advantages, &clip).unwrap();
        case.check(&named("policy_losses"), &out.losses);
        case.check(&named("policy_clipped"), &out.is_clipped);
        out.losses.mean(Kind::Double).backward();
        case.check(&named("policy_grad"), &leaf.grad());

        let leaf = case.input("new_values").set_requires_grad(true);
        let returns = case.expected.tensor(&named("returns"), Device::Cpu).unwrap();
        let out = value_losses(&leaf, &case.input("values"), &returns, Some(config.cliprange_value)).unwrap();
        case.check(&named("value_losses"), &out.losses);
        case.check(&named("value_clipped"), &out.is_clipped);
        out.losses.mean(Kind::Double).backward();
        case.check(&named("value_grad"), &leaf.grad());
    }
}

/// Completions of each prompt.
const GROUPS: [usize; 2] = [3, 3];
const MAX_LENGTH: usize = 10;

#[derive(Deserialize)]
struct GrpoRun {
    level: ImportanceLevel,
    average: LossAverage,
    low: f64,
    high: f64,
    dual: Option<f64>,
    beta: f64,
    kl_times_ratio: bool,
    micro_batches: usize,
}

#[test]
fn advantages_and_losses_of_grpo_and_its_relatives_equal_those_of_trl() {
    let case = Case::open("grpo");
    let (lengths, rewards) = (case.lengths(), case.floats("rewards"));
    assert!(rewards.iter().any(|reward| reward.is_nan()));
    for (name, scale) in [("group", ScaleRewards::Group), ("batch", ScaleRewards::Batch), ("none", ScaleRewards::None)]
    {
        case.check_slice(&format!("{name}.advantages"), &group_advantages(&rewards, &GROUPS, scale));
    }
    let advantages = group_advantages(&rewards, &GROUPS, ScaleRewards::Group);
    let window = LossWindow::of(&lengths, MAX_LENGTH);
    let (old_logprobs, reference) = (case.input("old_logprobs"), case.input("reference"));
    let runs = case.runs::<GrpoRun>();
    assert!(runs.len() > 10);
    for Run { name, config } in runs {
        let clip = PolicyClip { low: config.low, high: config.high, dual: config.dual };
        let leaf = case.input("logprobs").set_requires_grad(true);
        let (mut loss, mut num_clipped, mut start) = (Tensor::from(0f64), 0.0, 0);
        for (index, lengths) in lengths.chunks(lengths.len() / config.micro_batches).enumerate() {
            let num_tokens = lengths.iter().sum::<usize>() as i64;
            let part = |tokens: &Tensor| tokens.narrow(0, start, num_tokens);
            let logprobs = part(&leaf);
            let of_sequences = &advantages[index * lengths.len()..];
            let of_tokens: Vec<f32> =
                lengths.iter().zip(of_sequences).flat_map(|(length, one)| std::iter::repeat_n(*one, *length)).collect();
            let ratios = log_ratio(config.level, &logprobs, &part(&old_logprobs), lengths).unwrap();
            let out = clipped_losses(&ratios, &Tensor::from_slice(&of_tokens), &clip).unwrap();
            let mut losses = out.losses;
            if config.beta > 0.0 {
                let kl = KlEstimator::K3.tensor(&logprobs, &part(&reference));
                losses += if config.kl_times_ratio { kl * ratios.exp() } else { kl } * config.beta;
            }
            let weights = Tensor::from_slice(&token_weights(lengths, config.average, &window));
            loss += (losses * weights).sum(Kind::Double);
            num_clipped += out.is_clipped.sum(Kind::Double).double_value(&[]);
            start += num_tokens;
        }
        case.check(&format!("{name}.loss"), &loss);
        loss.backward();
        case.check(&format!("{name}.grad"), &leaf.grad());
        let clipped = format!("{name}.clipped");
        if case.expects(&clipped) {
            case.check(&clipped, &Tensor::from(num_clipped / window.num_tokens as f64));
        }
    }
}

#[derive(Deserialize)]
struct RlooRun {
    low: f64,
    high: f64,
    beta: f64,
}

#[test]
fn advantages_and_losses_of_rloo_equal_those_of_trl() {
    let case = Case::open("rloo");
    let (lengths, scores) = (case.lengths(), case.floats("rewards"));
    let kl = KlEstimator::K1.values(&case.floats("old_logprobs"), &case.floats("reference"));
    for Run { name, config } in case.runs::<RlooRun>() {
        // The price of a response's divergence, off its score.
        let mut start = 0;
        let price = |length: &usize| {
            start += length;
            config.beta * kl[start - length..start].iter().map(|kl| f64::from(*kl)).sum::<f64>()
        };
        let prices = lengths.iter().map(price);
        let rewards: Vec<f32> =
            scores.iter().zip(prices).map(|(score, price)| (f64::from(*score) - price) as f32).collect();
        let advantages = leave_one_out_advantages(&rewards, &GROUPS).unwrap();
        case.check_slice(&format!("{name}.advantages"), &advantages);

        let leaf = case.input("logprobs").set_requires_grad(true);
        let ratios = log_ratio(ImportanceLevel::Sum, &leaf, &case.input("old_logprobs"), &lengths).unwrap();
        let clip = PolicyClip { low: config.low, high: config.high, dual: None };
        let out = clipped_losses(&ratios, &Tensor::from_slice(&advantages), &clip).unwrap();
        let loss = out.losses.mean(Kind::Double);
        case.check(&format!("{name}.loss"), &loss);
        loss.backward();
        case.check(&format!("{name}.grad"), &leaf.grad());
        case.check(&format!("{name}.clipped"), &out.is_clipped.mean(Kind::Double));
    }
}
