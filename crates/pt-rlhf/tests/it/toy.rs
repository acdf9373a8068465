//! A tiny Llama with words `t0` to `t127`, tasks on them that are solved in a few iterations, and runs of it.

use pt_model::{CausalLm, Pretrained, Tokenizer};
use pt_peft::{Adapter, MethodConfig};
use pt_rlhf::reward::{Reward, Sample, WeightedSum};
use pt_rlhf::{
    Algorithm, Critic, CriticKind, IterationRecord, Phase, Prompt, Reference, Result, RlObserver, RlOutcome, RlRun,
    Roles, SampleRecord, ScalarHead, train,
};
use pt_tensor::{Device, Kind, Tensor};
use pt_train::Origin;
use pt_train::run_dir::RunDir;
use pt_train::settings::TrainConfig;
use pt_train::train::Trained;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// The token that ends a response; one that the model rarely writes, so that most run to their longest length.
pub(crate) const END: i64 = 127;

/// A reward by a function of the response's tokens.
pub(crate) struct ByTokens(pub(crate) fn(&[i64]) -> f64);

impl Reward for ByTokens {
    fn name(&self) -> &str {
        "tokens"
    }

    fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<f64>> {
        Ok(samples.iter().map(|sample| (self.0)(sample.response_ids)).collect())
    }
}

/// A tokenizer of words `t0`, `t1`, ...
pub(crate) fn tokenizer() -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let vocab: serde_json::Map<String, serde_json::Value> = (0..128).map(|id| (format!("t{id}"), id.into())).collect();
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "decoder": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"},
    });
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    Tokenizer::from_file(folder.path()).unwrap()
}

/// Prompts of a few tokens each.
pub(crate) fn prompts(count: usize) -> Vec<Prompt> {
    let prompt = |number: usize| Prompt {
        ids: vec![1, 10 + number as i64, 40 + number as i64],
        text: format!("t1 t{} t{}", 10 + number, 40 + number),
        question: format!("t{}", 10 + number),
        fields: serde_json::Map::new(),
        origin: Origin { path: PathBuf::from("prompts.jsonl"), position: number + 1, is_line: true },
        source: "prompts".into(),
    };
    (0..count).map(prompt).collect()
}

/// Hears nothing.
pub(crate) struct Deaf;

impl RlObserver for Deaf {}

/// Ends the process, as far as a test can, at the n-th thing that it hears.
pub(crate) struct Killer {
    pub(crate) left: usize,
}

impl Killer {
    fn hear(&mut self) {
        assert!(self.left > 0, "killed");
        self.left -= 1;
    }
}

impl RlObserver for Killer {
    fn on_phase(&mut self, _step: u64, _phase: Phase, _done: usize, _total: usize) {
        self.hear();
    }

    fn on_iteration(&mut self, _record: &IterationRecord, _samples: &[SampleRecord]) {
        self.hear();
    }

    fn on_evaluation(&mut self, _step: u64, _score: f64, _is_best: bool) {
        self.hear();
    }
}

/// Counts what is heard, and keeps the iterations.
#[derive(Default)]
pub(crate) struct Recorder {
    pub(crate) count: usize,
    pub(crate) iterations: Vec<IterationRecord>,
}

impl RlObserver for Recorder {
    fn on_phase(&mut self, _step: u64, _phase: Phase, _done: usize, _total: usize) {
        self.count += 1;
    }

    fn on_iteration(&mut self, record: &IterationRecord, _samples: &[SampleRecord]) {
        self.count += 1;
        self.iterations.push(record.clone());
    }

    fn on_evaluation(&mut self, _step: u64, _score: f64, _is_best: bool) {
        self.count += 1;
    }
}

/// A run and what stands at its end.
pub(crate) struct Played {
    pub(crate) outcome: RlOutcome,
    /// Trained values of actor and critic.
    pub(crate) values: Vec<(String, Vec<f32>)>,
}

/// Plays a run in `folder`, a new one or the one that stands there.
pub(crate) fn play<A: Algorithm>(
    config: &TrainConfig<A>,
    task: fn(&[i64]) -> f64,
    num_prompts: (usize, usize),
    folder: &Path,
    stop: &AtomicBool,
    observer: &mut dyn RlObserver,
) -> Result<Played> {
    let pretrained = Pretrained::open(fixtures().join("models/llama/model"))?;
    let model = CausalLm::load(&pretrained, Device::Cpu, Kind::Float)?;
    let adapter = |seed| -> Rc<dyn Adapter> {
        let adapter = MethodConfig::Lora(config.lora.clone()).create(&model, None, seed).unwrap();
        adapter.set_training(config.lora.lora_dropout > 0.0);
        adapter
    };
    let actor = adapter(config.seed);
    let mut leaves = actor.parameters();
    let settings = config.objective.value_settings();
    let critic = settings.map(|settings| {
        let head = ScalarHead::new(model.config().hidden_size, config.seed, Device::Cpu).unwrap();
        if settings.critic.kind == CriticKind::ActorHead {
            leaves.extend(head.parameters());
            return Critic::OnActor(head);
        }
        let own = adapter(config.seed + 1);
        let parameters = own.parameters().into_iter().chain(head.parameters()).collect();
        Critic::Own(trained(&model, own, parameters), head)
    });
    let of_critic = match &critic {
        Some(Critic::Own(trained, _)) => shared(&trained.parameters),
        _ => vec![],
    };
    let all: Vec<(String, Tensor)> = shared(&leaves).into_iter().chain(of_critic).collect();
    let mut reward = WeightedSum::new("rewards");
    reward.push("tokens", 1.0, Box::new(ByTokens(task)));
    let run = match folder.join("config.yaml").exists() {
        true => RunDir::open(folder)?,
        false => RunDir::create(folder, "seed: 0\n")?,
    };
    let (prompts, eval_prompts) = (prompts(num_prompts.0), prompts(num_prompts.1));
    let tokenizer = tokenizer();
    let outcome = train(
        &mut RlRun {
            roles: Roles {
                actor: trained(&model, actor, leaves),
                reference: Some(Reference::Sites(Rc::new(pt_model::Bare))),
                critic,
            },
            reward,
            prompts: &prompts,
            eval_prompts: &eval_prompts,
            tokenizer: &tokenizer,
            stop_ids: &[END],
            config,
            run: &run,
        },
        stop,
        observer,
    )?;
    let values = all.into_iter().map(|(name, leaf)| (name, Vec::try_from(leaf.detach().flatten(0, -1)).unwrap()));
    Ok(Played { outcome, values: values.collect() })
}

fn shared(leaves: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    leaves.iter().map(|(name, leaf)| (name.clone(), leaf.shallow_clone())).collect()
}

fn trained<'a>(model: &'a CausalLm, adapter: Rc<dyn Adapter>, parameters: Vec<(String, Tensor)>) -> Trained<'a> {
    let saved = adapter.clone();
    Trained {
        model,
        sites: adapter,
        parameters,
        lr_factor: Box::new(|_| 1.0),
        save: Box::new(move |folder: &Path| Ok(saved.save(&folder.join("adapter"))?)),
    }
}
