//! One iteration of PPO against an independent one in f64 (`fixtures/generate/ppo.py`).

use crate::algorithm::{Algorithm, Evidence};
use crate::roles::{Critic, Reference, Roles};
use crate::rollout::Rollout;
use crate::update::{Sums, Updater, value_gradients};
use crate::{KlEstimator, PolicyClip, PpoConfig, RolloutConfig, ScalarHead, ScorePlacement};
use pt_model::{Bare, CausalLm, Completion, Pretrained, PromptGroup};
use pt_peft::{Adapter, load_adapter};
use pt_tensor::io::SafetensorsReader;
use pt_tensor::{AdamWConfig, Device, Kind, Tensor};
use pt_train::schedule::{ScheduleConfig, ScheduleKind};
use pt_train::settings::TrainConfig;
use pt_train::step::Optimization;
use pt_train::train::Trained;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::rc::Rc;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

fn list<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap()
}

/// As `case.toml` has the settings.
fn settings(is_after_end: bool, max_tokens: Option<usize>) -> TrainConfig<PpoConfig> {
    let objective = PpoConfig {
        rollout: RolloutConfig { temperature: 0.7, ..RolloutConfig::default() },
        num_samples: 2,
        kl_coef: 0.2,
        kl_estimator: if is_after_end { KlEstimator::K3 } else { KlEstimator::K1 },
        score_placement: if is_after_end { ScorePlacement::AfterEnd } else { ScorePlacement::LastToken },
        gamma: 0.97,
        lam: 0.9,
        clip: PolicyClip { low: 0.02, high: 0.02, dual: None },
        value_clip: Some(0.05),
        vf_coef: 0.3,
        num_epochs: 2,
        ..PpoConfig::default()
    };
    let mut config = TrainConfig { objective, learning_rate: 1e-3, max_grad_norm: None, ..TrainConfig::default() };
    config.adamw = AdamWConfig { eps: 1e-3, weight_decay: 0.0, ..AdamWConfig::default() };
    config.batch.max_tokens = max_tokens;
    config
}

struct Golden {
    rollout: Rollout,
    head: Vec<f32>,
    policy_losses: Vec<f64>,
    value_losses: Vec<f64>,
    clipped: Vec<f64>,
    expected: SafetensorsReader,
}

impl Golden {
    fn open(case: &str) -> Self {
        let folder = fixtures().join("ppo").join(case);
        let json: Value = serde_json::from_slice(&std::fs::read(folder.join("rollout.json")).unwrap()).unwrap();
        let prompts: Vec<Vec<i64>> = list(&json["prompts"]);
        let responses: Vec<Vec<Vec<i64>>> = list(&json["responses"]);
        let is_ended: Vec<Vec<bool>> = list(&json["is_ended"]);
        let scores: Vec<Vec<f32>> = list(&json["scores"]);
        let expected = SafetensorsReader::open(folder.join("expected.safetensors")).unwrap();
        let group = |(prompt, responses): (Vec<i64>, Vec<Vec<i64>>)| PromptGroup {
            prompt,
            completions: responses.into_iter().map(Completion::new).collect(),
        };
        let groups: Vec<PromptGroup> = prompts.into_iter().zip(responses).map(group).collect();
        let rollout = Rollout {
            prompts: (0..groups.len()).collect(),
            texts: vec![String::new(); groups.iter().map(|group| group.completions.len()).sum()],
            groups,
            is_ended: is_ended.concat(),
            logprobs: Vec::try_from(expected.tensor("logprobs", Device::Cpu).unwrap()).unwrap(),
            scores: scores.concat(),
            parts: vec![],
        };
        Self {
            rollout,
            head: list(&json["head"]),
            policy_losses: list(&json["policy_losses"]),
            value_losses: list(&json["value_losses"]),
            clipped: list(&json["clipped"]),
            expected,
        }
    }

    fn tensor(&self, name: &str) -> Tensor {
        self.expected.tensor(name, Device::Cpu).unwrap()
    }

    fn check(&self, name: &str, found: &[f32]) {
        let expected = Vec::<f32>::try_from(self.tensor(name)).unwrap();
        assert_eq!(found.len(), expected.len(), "{name}");
        let most = expected.iter().fold(1f32, |most, value| most.max(value.abs()));
        for (place, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!((found - expected).abs() <= 1e-5 * most, "{name}[{place}] is {found}, expected {expected}");
        }
    }
}

/// Largest difference from a reference, relative to its largest entry.
fn apart(found: &Tensor, expected: &Tensor) -> f64 {
    let most = expected.abs().max().double_value(&[]).max(1e-12);
    (found.detach().to_kind(Kind::Float) - expected).abs().max().double_value(&[]) / most
}

/// Plays the iteration, in micro-batches of at most `max_tokens`, and holds every number to the golden ones.
fn play(case: &str, max_tokens: Option<usize>) {
    let golden = Golden::open(case);
    let config = settings(case == "score_after_end", max_tokens);
    let pretrained = Pretrained::open(fixtures().join("models/llama/model")).unwrap();
    let model = CausalLm::load(&pretrained, Device::Cpu, Kind::Float).unwrap();
    let adapter = |name: &str| load_adapter(&fixtures().join("lora").join(name).join("adapter"), &model).unwrap();
    let (actor, critic): (Rc<dyn Adapter>, Rc<dyn Adapter>) = (adapter("rslora_all_linear"), adapter("plain"));
    let head = ScalarHead::from_tensor(&Tensor::from_slice(&golden.head).view([1, -1])).unwrap();
    let trained = |adapter: &Rc<dyn Adapter>, more: Vec<(String, Tensor)>| Trained {
        model: &model,
        sites: adapter.clone(),
        parameters: adapter.parameters().into_iter().chain(more).collect(),
        lr_factor: Box::new(|_| 1.0),
        save: Box::new(|_| Ok(())),
    };
    let roles = Roles {
        actor: trained(&actor, vec![]),
        reference: Some(Reference::Sites(Rc::new(Bare))),
        critic: Some(Critic::Own(trained(&critic, head.parameters()), head.shared())),
    };
    let optimization = |parameters: Vec<(String, Tensor)>| {
        let kind = ScheduleKind::Constant;
        let schedule = ScheduleConfig { kind, warmup_steps: Some(0), ..ScheduleConfig::default() }.build(2).unwrap();
        let folder = std::env::temp_dir();
        Optimization::new(parameters, config.adamw, &folder, schedule, config.learning_rate, None).unwrap()
    };
    let own = optimization(actor.parameters());
    let of_critic = optimization(critic.parameters().into_iter().chain(head.parameters()).collect());
    let mut updater = Updater::new(own, Some(of_critic), &config);

    let compared = updater.compare(&roles, golden.rollout.clone(), 1).unwrap();
    golden.check("reference", compared.reference.as_deref().unwrap());
    golden.check("values", compared.values.as_deref().unwrap());
    let mut state = config.objective.start();
    let evidence = Evidence { reference: compared.reference.as_deref(), values: compared.values.as_deref() };
    let targets = config.objective.targets(&compared.rollout, evidence, &mut state).unwrap();
    golden.check("advantages", &targets.advantages);
    golden.check("returns", &targets.returns);

    // The gradients of the first step, which is then made again.
    let all = [0, 1, 2];
    updater.policy_gradients(&roles, &compared, &targets, &all, (1, 0, true), &mut Sums::default()).unwrap();
    let Some(Critic::Own(critic_trained, _)) = &roles.critic else { unreachable!("made above") };
    let of_critic = (critic_trained, &head);
    value_gradients(&config, &roles, of_critic, &compared, &targets, &all, 1, &mut Sums::default()).unwrap();
    assert!(updater.sampling_gap < 1e-4, "{}", updater.sampling_gap);
    let mut num_checked = 0;
    for (who, leaves) in [("actor", &roles.actor.parameters), ("critic", &critic_trained.parameters)] {
        for (name, leaf) in leaves {
            let golden_name = match name.as_str() {
                "score.weight" => "gradient.head".to_string(),
                name => format!("gradient.{who}.base_model.model.{name}"),
            };
            let off = apart(&leaf.grad(), &golden.tensor(&golden_name));
            assert!(off < 2e-5, "{golden_name}: {off:.1e}");
            leaf.shallow_clone().zero_grad();
            num_checked += 1;
        }
    }
    assert!(num_checked > 20, "{num_checked}");

    let update = updater.update(&roles, &compared, &targets, 1, &mut |_, _| ()).unwrap();
    for (who, adapter) in [("actor", &actor), ("critic", &critic)] {
        for (name, leaf) in adapter.parameters() {
            let off = apart(&leaf, &golden.tensor(&format!("after.{who}.base_model.model.{name}")));
            assert!(off < 1e-5, "{who} {name}: {off:.1e}");
        }
    }
    assert!(apart(head.weight(), &golden.tensor("after.head")) < 1e-5);
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let value = |name: &str| update.values.iter().find(|(known, _)| *known == name).unwrap().1;
    for (name, expected) in [
        ("loss/policy_avg", mean(&golden.policy_losses)),
        ("loss/value_avg", mean(&golden.value_losses)),
        ("policy/clipfrac_avg", mean(&golden.clipped)),
    ] {
        assert!((value(name) - expected).abs() < 1e-5, "{name} is {}, expected {expected}", value(name));
    }
    assert!(golden.clipped[1] > 0.0, "the second epoch clips something");
}

#[test]
fn an_iteration_equals_an_independent_one_in_f64() {
    play("score_on_last_token", None);
}

#[test]
fn so_it_does_with_the_score_after_the_end_and_in_micro_batches_of_one_prompt() {
    play("score_after_end", Some(1));
}
