//! Reinforcement learning under test: prompts, roles over one base, and the seconds of iterations.

use crate::model_path;
use anyhow::{Result, ensure};
use pt_model::{Bare, CausalLm, Pretrained, Sites};
use pt_peft::{Adapter, LoraAdapter, LoraConfig};
use pt_rlhf::reward::{Reward, WeightedSum};
use pt_rlhf::{
    Algorithm, Critic, CriticKind, IterationRecord, ModelScorer, Prompt, Reference, RewardModel, RlObserver, RlRun,
    Roles, SampleRecord, ScalarHead, train,
};
use pt_tensor::{Device, parse_kind, peak_memory_bytes};
use pt_train::Origin;
use pt_train::config::to_yaml;
use pt_train::run_dir::RunDir;
use pt_train::settings::TrainConfig;
use pt_train::train::Trained;
use serde_json::{Value, json};
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

/// What scores the responses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judge {
    /// A reward model: an adapter and a head over the base.
    Model,
    /// How many tokens of a response are even: what costs nothing.
    Rule,
}

/// `count` prompts of about 65 tokens (±50 %), the same on every machine.
pub fn prompt_ids(count: usize) -> Vec<Vec<i64>> {
    let shorter = |ids: Vec<i64>| ids.iter().take(ids.len() * 3 / 5).copied().collect();
    crate::rows(count).into_iter().map(|row| shorter(row.prompt)).collect()
}

struct EvenTokens;

impl Reward for EvenTokens {
    fn name(&self) -> &str {
        "even"
    }

    fn score(&mut self, samples: &[pt_rlhf::reward::Sample<'_>]) -> pt_rlhf::Result<Vec<f64>> {
        let share = |ids: &[i64]| ids.iter().filter(|id| **id % 2 == 0).count() as f64 / ids.len().max(1) as f64;
        Ok(samples.iter().map(|sample| share(sample.response_ids)).collect())
    }
}

/// Keeps the numbers of iterations.
#[derive(Default)]
struct Clock(Vec<IterationRecord>);

impl RlObserver for Clock {
    fn on_iteration(&mut self, record: &IterationRecord, _samples: &[SampleRecord]) {
        self.0.push(record.clone());
    }
}

/// Iterations with LoRA of rank 16; the seconds of all but the first, per iteration and by part. No token ends a response,
/// so that all are as long as they may be.
///
/// # Errors
/// Those of the model and of the training loop.
pub fn measure<A: Algorithm>(
    config: &TrainConfig<A>,
    prompts: Vec<Vec<i64>>,
    judge: Judge,
    dtype: &str,
    folder: &Path,
) -> Result<Value> {
    let kind = parse_kind(dtype)?.kind(Device::Cpu);
    let pretrained = Pretrained::open(model_path()?)?;
    let tokenizer = pretrained.tokenizer.as_ref().ok_or_else(|| anyhow::anyhow!("the model carries no tokenizer"))?;
    let model = Rc::new(CausalLm::load(&pretrained, Device::Cpu, kind)?);
    let adapter = |seed| -> Result<Rc<dyn Adapter>> {
        let adapter = LoraAdapter::new(LoraConfig::default(), &*model, seed)?;
        adapter.set_training(true);
        Ok(Rc::new(adapter))
    };
    let (width, actor) = (model.config().hidden_size, adapter(0)?);
    let trained = |sites: &Rc<dyn Adapter>, parameters| Trained {
        model: &model,
        sites: sites.clone() as Rc<dyn Sites>,
        parameters,
        lr_factor: Box::new(|_| 1.0),
        save: Box::new(|_| Ok(())),
    };
    let mut parameters = actor.parameters();
    let critic = match config.objective.value_settings().map(|settings| settings.critic.kind) {
        None => None,
        Some(CriticKind::ActorHead) => {
            let head = ScalarHead::new(width, 1, Device::Cpu)?;
            parameters.extend(head.parameters());
            Some(Critic::OnActor(head))
        }
        Some(CriticKind::Adapter) => {
            let (head, own) = (ScalarHead::new(width, 1, Device::Cpu)?, adapter(1)?);
            let mut parameters = own.parameters();
            parameters.extend(head.parameters());
            Some(Critic::Own(trained(&own, parameters), head))
        }
    };
    let mut reward = WeightedSum::new("reward");
    let part: Box<dyn Reward> = match judge {
        Judge::Rule => Box::new(EvenTokens),
        Judge::Model => {
            let head = RewardModel::new(ScalarHead::new(width, 2, Device::Cpu)?);
            Box::new(ModelScorer::new("model", model.clone(), adapter(2)? as Rc<dyn Sites>, head)?)
        }
    };
    reward.push("reward", 1.0, part);
    let prompt = |(number, ids): (usize, Vec<i64>)| Prompt {
        ids,
        text: String::new(),
        question: String::new(),
        fields: serde_json::Map::new(),
        origin: Origin { path: "prompts.jsonl".into(), position: number + 1, is_line: true },
        source: "prompts".into(),
    };
    let prompts: Vec<Prompt> = prompts.into_iter().enumerate().map(prompt).collect();
    let run = RunDir::create(folder, &to_yaml(config)?)?;
    let mut run = RlRun {
        roles: Roles { actor: trained(&actor, parameters), reference: Some(Reference::Sites(Rc::new(Bare))), critic },
        reward,
        prompts: &prompts,
        eval_prompts: &[],
        tokenizer,
        stop_ids: &[],
        config,
        run: &run,
    };
    let mut clock = Clock::default();
    train(&mut run, &AtomicBool::new(false), &mut clock)?;
    let measured = clock.0.get(1..).unwrap_or_default();
    ensure!(!measured.is_empty(), "an iteration alone measures nothing: --steps is at least 1");
    let mean =
        |name: &str| measured.iter().filter_map(|record| record.value(name)).sum::<f64>() / measured.len() as f64;
    let [rollout, scoring, compare, update] =
        ["rollout", "scoring", "compare", "update"].map(|part| mean(&format!("seconds/{part}")));
    let iteration = rollout + scoring + compare + update;
    let num_samples = config.batch.rows_per_step() * config.objective.num_samples();
    Ok(json!({
        "samples_per_s": num_samples as f64 / iteration,
        "iteration_s": iteration,
        // Sampling, the reward model, the passes of reference and critic, the optimizer steps.
        "rollout_s": rollout,
        "scoring_s": scoring,
        "compare_s": compare,
        "update_s": update,
        "tokens_per_response": mean("completions/mean_length"),
        "peak_rss_bytes": peak_memory_bytes(),
    }))
}
