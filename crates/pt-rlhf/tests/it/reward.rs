//! Reward models: scores and files of transformers and PEFT, steps of TRL's RewardTrainer, and equalities of training.

use pt_model::{Bare, CausalLm, Completion, PackedBatch, Pretrained, PromptGroup, RunOptions, Sites};
use pt_peft::{Adapter, LoraAdapter, LoraConfig, PromptTuningAdapter, PromptTuningConfig};
use pt_rlhf::{
    RankingLoss, RewardConfig, RewardModel, RewardTraining, ScalarHead, ScoreStatistics, end_at_turn, trunk_of,
};
use pt_tensor::io::SafetensorsReader;
use pt_tensor::{AdamWConfig, Device, Kind, Tensor, no_grad};
use pt_train::data::{BatchConfig, Encode, Judgement, Message, PreferenceGroup, Scores};
use pt_train::objective::{Objective, Pass, evaluate};
use pt_train::run_dir::RunDir;
use pt_train::schedule::{ScheduleConfig, ScheduleKind};
use pt_train::settings::TrainConfig;
use pt_train::train::{Observer, Outcome, StepRecord, Trained, train};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

fn fixtures(area: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(area)
}

/// Runs draw from libtorch's one generator, so those of a process take turns.
fn take_turns() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    pt_tensor::set_num_threads(1);
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn bare() -> Rc<dyn Sites> {
    Rc::new(Bare)
}

/// A trunk with the checkpoint that it is of.
fn trunk(folder: &Path) -> (Pretrained, CausalLm) {
    let pretrained = trunk_of(Pretrained::open(folder).unwrap()).unwrap();
    let model = CausalLm::load(&pretrained, Device::Cpu, Kind::Float).unwrap();
    (pretrained, model)
}

fn tiny(name: &str) -> CausalLm {
    trunk(&fixtures(&format!("models/{name}/model"))).1
}

/// The sequences of a case, each a prompt of some tokens and a completion.
fn sequences(inputs: &SafetensorsReader) -> Vec<PromptGroup> {
    let take = |name: &str| Vec::<i64>::try_from(inputs.tensor(name, Device::Cpu).unwrap()).unwrap();
    let (ids, lengths) = (take("input_ids"), take("lengths"));
    let mut rest = ids.as_slice();
    let group = |length: &i64| {
        let (sequence, after) = rest.split_at(*length as usize);
        rest = after;
        let (prompt, completion) = sequence.split_at(sequence.len() / 3);
        PromptGroup::single(prompt.to_vec(), Completion::new(completion.to_vec()))
    };
    lengths.iter().map(group).collect()
}

fn scores(reward: &RewardModel, model: &CausalLm, sites: &Rc<dyn Sites>, groups: &[PromptGroup]) -> Vec<f64> {
    let batch = PackedBatch::new(groups, Device::Cpu).unwrap();
    let scores = no_grad(|| reward.scores(model, sites, &batch, RunOptions::default())).unwrap();
    Vec::try_from(scores.to_kind(Kind::Double)).unwrap()
}

#[track_caller]
fn assert_near(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let worst = found.iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0.0, f64::max);
    println!("{what}: within {worst:.1e}");
    assert!(worst <= tolerance, "{what}: {found:?}, expected {expected:?}");
}

/// A case of `fixtures/reward` with scores: its sequences, and what is expected.
fn scored_case(name: &str) -> (PathBuf, Vec<PromptGroup>, Vec<f64>) {
    let folder = fixtures("reward").join(name);
    let groups = sequences(&SafetensorsReader::open(folder.join("inputs.safetensors")).unwrap());
    let expected = SafetensorsReader::open(folder.join("expected.safetensors")).unwrap();
    let expected = expected.tensor("scores", Device::Cpu).unwrap().to_kind(Kind::Double);
    (folder, groups, Vec::try_from(expected).unwrap())
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn names_and_shapes(file: &Path) -> BTreeMap<String, Vec<i64>> {
    let reader = SafetensorsReader::open(file).unwrap();
    reader.names().map(|name| (name.to_string(), reader.shape(name).unwrap().to_vec())).collect()
}

/// What a test does to a file's tensors.
type Change<'a> = dyn Fn(&mut Vec<(String, Tensor)>) + 'a;

#[test]
fn golden_reward_heads_give_the_scores_of_transformers_and_are_written_as_it_has_them() {
    for base in ["llama", "mistral", "qwen2", "gpt2"] {
        let (folder, groups, expected) = scored_case(&format!("{base}_head"));
        let (pretrained, model) = trunk(&folder.join("model"));
        let mut reward = RewardModel::of_pretrained(&pretrained, Device::Cpu).unwrap().unwrap();
        assert_near(base, &scores(&reward, &model, &bare(), &groups), &expected, 1e-5);
        // Written and read again.
        reward.statistics = ScoreStatistics::of(&[0.0, 1.0, 5.0]);
        let place = tempfile::tempdir().unwrap();
        let written = place.path().join("written");
        reward.save_model(&model, &pretrained, &written, 1_000_000_000).unwrap();
        let file = "model.safetensors";
        let own = names_and_shapes(&written.join(file));
        let theirs = names_and_shapes(&folder.join("model").join(file));
        // Of GPT-2 some releases leave the prefix out; theirs may as well.
        assert_eq!(own, theirs, "{base}");
        for key in ["architectures", "id2label", "label2id", "pad_token_id", "model_type"] {
            let (own, theirs) = (json(&written.join("config.json")), json(&folder.join("model/config.json")));
            assert_eq!(own[key], theirs[key], "{base}: {key}");
        }
        let (pretrained, model) = trunk(&written);
        let again = RewardModel::of_pretrained(&pretrained, Device::Cpu).unwrap().unwrap();
        assert_eq!(again.statistics, reward.statistics);
        assert_near(base, &scores(&again, &model, &bare(), &groups), &expected, 1e-5);
    }
}

#[test]
fn golden_reward_adapters_of_peft_give_its_scores_and_are_written_as_it_has_them() {
    for (case, base) in [("llama_lora", "llama"), ("gpt2_lora", "gpt2"), ("llama_prompt_tuning", "llama")] {
        let (folder, groups, expected) = scored_case(case);
        let model = tiny(base);
        let (mut reward, adapter) = RewardModel::load_adapter(&folder.join("adapter"), &model).unwrap();
        let sites: Rc<dyn Sites> = adapter.clone();
        assert_near(case, &scores(&reward, &model, &sites, &groups), &expected, 1e-5);
        reward.statistics = Some(ScoreStatistics { mean: 0.5, std: 2.0, count: 7 });
        let place = tempfile::tempdir().unwrap();
        let written = place.path().join("written");
        // Twice: the second time over files that have a head.
        for _ in 0..2 {
            reward.save_adapter(adapter.as_ref(), &written).unwrap();
            let file = "adapter_model.safetensors";
            assert_eq!(
                names_and_shapes(&written.join(file)),
                names_and_shapes(&folder.join("adapter").join(file)),
                "{case}"
            );
            let config = json(&written.join("adapter_config.json"));
            assert_eq!(config["task_type"], "SEQ_CLS");
            assert_eq!(config["modules_to_save"], serde_json::json!(["score"]));
            let card = std::fs::read_to_string(written.join("README.md")).unwrap();
            assert!(card.contains("text-classification") && card.matches("A reward model").count() == 1, "{card}");
            assert!(RewardModel::is_adapter(&written).unwrap());
            let (again, adapter) = RewardModel::load_adapter(&written, &model).unwrap();
            assert_eq!(again.statistics, reward.statistics);
            let sites: Rc<dyn Sites> = adapter;
            assert_near(case, &scores(&again, &model, &sites, &groups), &expected, 1e-5);
        }
    }
}

/// A value of a case's `case.toml`.
fn number(folder: &Path, key: &str) -> Option<f64> {
    let text = std::fs::read_to_string(folder.join("case.toml")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix('='))?;
    line.trim().parse().ok()
}

fn pairs(folder: &Path) -> Vec<PreferenceGroup> {
    let text = std::fs::read_to_string(folder.join("rows.jsonl")).unwrap();
    let group = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        let ids = |key: &str| row[key].as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect::<Vec<_>>();
        let completions = ["chosen_ids", "rejected_ids"].map(|side| Completion::new(ids(side)));
        PreferenceGroup {
            group: PromptGroup { prompt: ids("prompt_ids"), completions: completions.into() },
            judgement: Judgement::Ranks { ranks: vec![0, 1], scores: row["margin"].as_f64().map(Scores::of_margin) },
            weight: 1.0,
        }
    };
    text.lines().map(group).collect()
}

/// What is trained: a model, what is switched on at its sites, a head.
struct Setup {
    model: CausalLm,
    sites: Rc<dyn Sites>,
    parameters: Vec<(String, Tensor)>,
    reward: RewardModel,
}

impl Setup {
    fn lora(model: CausalLm, (reward, adapter): (RewardModel, Rc<dyn Adapter>)) -> Self {
        adapter.set_training(true);
        let parameters = [adapter.parameters(), reward.head.parameters()].concat_shallow();
        Self { model, sites: adapter, parameters, reward }
    }

    fn full(mut model: CausalLm, head: &Tensor) -> Self {
        let reward = RewardModel::new(ScalarHead::from_tensor(head).unwrap());
        let parameters = [model.train_all().unwrap(), reward.head.parameters()].concat_shallow();
        Self { model, sites: bare(), parameters, reward }
    }

    /// LoRA and a head away from their start.
    fn moved() -> Self {
        let model = tiny("llama");
        let config = LoraConfig { rank: 4, lora_alpha: 8.0, ..Default::default() };
        let adapter: Rc<dyn Adapter> = Rc::new(LoraAdapter::new(config, &model, 3).unwrap());
        for (_, value) in adapter.parameters().iter().filter(|(name, _)| name.contains("lora_B")) {
            let count: i64 = value.size().iter().product();
            let ramp = Tensor::arange(count, (Kind::Float, Device::Cpu)).view(&value.size()[..]).sin() * 0.05;
            no_grad(|| value.shallow_clone().copy_(&ramp));
        }
        let reward = RewardModel::new(ScalarHead::new(32, 1, Device::Cpu).unwrap());
        Self::lora(model, (reward, adapter))
    }

    fn pass(&self) -> Pass<'_> {
        Pass { step: 1, model: &self.model, sites: &self.sites, options: RunOptions::default() }
    }

    fn train(
        &self,
        rows: Vec<PreferenceGroup>,
        config: &TrainConfig<RewardConfig>,
        run: &RunDir,
        stop_after: Option<u64>,
    ) -> (Outcome, Vec<StepRecord>, RewardTraining) {
        let trained = Trained {
            model: &self.model,
            sites: self.sites.clone(),
            parameters: self.parameters.iter().map(|(name, value)| (name.clone(), value.shallow_clone())).collect(),
            lr_factor: Box::new(|_: &str| 1.0),
            save: Box::new(|_: &Path| Ok(())),
        };
        let stop = AtomicBool::new(false);
        let mut recorder = Recorder { records: vec![], stop_after, stop: &stop };
        let mut objective = RewardTraining::new(config.objective.clone(), self.reward.shared()).unwrap();
        let outcome = train(&trained, &mut objective, (rows, &[]), config, run, &stop, &mut recorder).unwrap();
        (outcome, recorder.records, objective)
    }
}

/// Lists of named tensors end to end.
trait ConcatShallow {
    fn concat_shallow(self) -> Vec<(String, Tensor)>;
}

impl ConcatShallow for [Vec<(String, Tensor)>; 2] {
    fn concat_shallow(self) -> Vec<(String, Tensor)> {
        self.into_iter().flatten().collect()
    }
}

struct Recorder<'a> {
    records: Vec<StepRecord>,
    stop_after: Option<u64>,
    stop: &'a AtomicBool,
}

impl Observer for Recorder<'_> {
    fn on_step(&mut self, record: &StepRecord) {
        self.records.push(record.clone());
        if self.stop_after == Some(record.step) {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}

fn new_run() -> (tempfile::TempDir, RunDir) {
    let folder = tempfile::tempdir().unwrap();
    let run = RunDir::create(&folder.path().join("run"), "seed: 0\n").unwrap();
    (folder, run)
}

/// Trains on a case's rows and compares each step, and the weights after the last, with TRL's.
fn check_training(name: &str, setup: &Setup, file_name: impl Fn(&str) -> String) {
    let folder = fixtures("reward").join(name);
    let number = |key: &str| number(&folder, key).unwrap();
    let centering = self::number(&folder, "center_rewards_coefficient");
    let config = TrainConfig::<RewardConfig> {
        objective: RewardConfig {
            center_rewards_coefficient: centering,
            use_margin: centering.is_some(),
            ..Default::default()
        },
        max_steps: Some(number("steps") as u64),
        learning_rate: number("learning_rate"),
        schedule: ScheduleConfig {
            kind: ScheduleKind::Linear,
            warmup_steps: Some(number("warmup_steps") as usize),
            ..Default::default()
        },
        adamw: AdamWConfig { weight_decay: number("weight_decay"), ..Default::default() },
        max_grad_norm: Some(number("max_grad_norm")),
        batch: BatchConfig {
            batch_size: number("batch_size") as usize,
            accumulation: number("gradient_accumulation") as usize,
            shuffle: false,
            ..Default::default()
        },
        save_every: 0,
        peft: None,
        ..Default::default()
    };
    let (_folder, run) = new_run();
    let (_, records, _) = setup.train(pairs(&folder), &config, &run, None);
    let expected = SafetensorsReader::open(folder.join("expected.safetensors")).unwrap();
    let mut columns: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for record in &records {
        let own = [("loss", record.loss), ("grad_norm", record.grad_norm), ("learning_rate", record.learning_rate)];
        for (name, value) in record.values.iter().copied().chain(own) {
            columns.entry(name).or_default().push(value);
        }
    }
    assert_eq!(columns.len(), 8);
    for (column, found) in columns {
        let want = Vec::<f64>::try_from(expected.tensor(column, Device::Cpu).unwrap()).unwrap();
        assert_eq!(found.len(), want.len());
        // Scores and their differences are good to so many parts of a score.
        let floor = if column.contains("reward") || column == "margin" { 1.0 } else { 1e-2 };
        let errors = found.iter().zip(&want).map(|(f, w)| (f - w).abs() / w.abs().max(floor));
        let worst = errors.fold(0.0, f64::max);
        println!("{name}: {column} relative error {worst:.2e}");
        assert!(worst <= number("rtol"), "{name}: {column} is off by {worst:.2e}: {found:?}, TRL has {want:?}");
    }
    // Adam moves an entry by up to the learning rate a step whatever its gradient's size, so one whose gradient is
    // rounding noise may part by a part of a step; the mean is held closer.
    let step = config.learning_rate;
    for (own, value) in &setup.parameters {
        let want = expected.tensor(&file_name(own), Device::Cpu).unwrap();
        let error = (value.detach().to_kind(Kind::Double) - want).abs();
        let (max, mean) = (error.max().double_value(&[]), error.mean(Kind::Double).double_value(&[]));
        assert!(max <= 0.1 * step && mean <= 1e-3 * step, "{name}: {own} is off by {max:.2e}, {mean:.2e} in the mean");
    }
}

#[test]
fn golden_reward_training_of_lora_equals_that_of_trl() {
    let _turn = take_turns();
    let model = tiny("llama");
    let adapter = RewardModel::load_adapter(&fixtures("reward/train_lora/initial_adapter"), &model).unwrap();
    let setup = Setup::lora(model, adapter);
    check_training("train_lora", &setup, |name| format!("final.base_model.model.{name}"));
}

#[test]
fn golden_reward_training_of_all_weights_with_margins_equals_that_of_trl() {
    let _turn = take_turns();
    let inputs = SafetensorsReader::open(fixtures("reward/train_full/inputs.safetensors")).unwrap();
    let setup = Setup::full(tiny("llama"), &inputs.tensor("score.weight", Device::Cpu).unwrap());
    check_training("train_full", &setup, |name| format!("final.{name}"));
}

/// Some prompts with lists of completions of their own and of their neighbours.
fn lists() -> Vec<PreferenceGroup> {
    let rows = pairs(&fixtures("reward/train_full"));
    let list = |index: usize| {
        let own = &rows[index].group;
        let completions = [&own.completions[..], &rows[index + 1].group.completions[..index % 3]].concat();
        let ranks = [[0, 1, 1, 2], [1, 0, 2, 2], [0, 0, 1, 2]][index % 3][..completions.len()].to_vec();
        let scores = Some(ranks.iter().map(|rank| -f64::from(*rank) / 2.0).collect());
        PreferenceGroup {
            group: PromptGroup { prompt: own.prompt.clone(), completions },
            judgement: Judgement::Ranks { ranks, scores },
            weight: 1.0 + index as f64 / 4.0,
        }
    };
    (0..8).map(list).collect()
}

/// Loss and gradients of one window, cut into micro-batches as given.
fn gradients(setup: &Setup, config: &RewardConfig, window: &[&[PreferenceGroup]]) -> (f64, Vec<Tensor>) {
    let mut objective = RewardTraining::new(config.clone(), setup.reward.shared()).unwrap();
    let micro_batches: Vec<Vec<&PreferenceGroup>> = window.iter().map(|rows| rows.iter().collect()).collect();
    let record = objective.accumulate(&setup.pass(), &micro_batches).unwrap();
    let take = |(_, tensor): &(String, Tensor)| {
        let mut tensor = tensor.shallow_clone();
        let gradient = tensor.grad().copy();
        tensor.zero_grad();
        gradient
    };
    (record.loss, setup.parameters.iter().map(take).collect())
}

#[track_caller]
fn assert_same(what: &str, one: &(f64, Vec<Tensor>), other: &(f64, Vec<Tensor>)) {
    assert!((one.0 - other.0).abs() <= 1e-6 * other.0.abs(), "{what}: losses {} and {}", one.0, other.0);
    let norm = |tensors: &[Tensor]| {
        tensors.iter().map(|tensor| tensor.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt()
    };
    let apart: Vec<Tensor> = one.1.iter().zip(&other.1).map(|(a, b)| a - b).collect();
    assert!(norm(&other.1) > 1e-3, "{what}: there is a gradient to compare");
    assert!(norm(&apart) <= 1e-5 * norm(&other.1), "{what}: gradients part by {:.2e}", norm(&apart) / norm(&other.1));
}

#[test]
fn neither_the_order_nor_the_split_of_a_window_changes_its_gradient() {
    let _turn = take_turns();
    let setup = Setup::moved();
    for config in [
        RewardConfig { use_margin: true, center_rewards_coefficient: Some(0.01), ..Default::default() },
        RewardConfig { loss: RankingLoss::PlackettLuce, ..Default::default() },
    ] {
        let what = format!("{config:?}");
        let rows = lists();
        let whole = gradients(&setup, &config, &[&rows]);
        assert_same(&what, &gradients(&setup, &config, &[&rows[..3], &rows[3..4], &rows[4..]]), &whole);
        let backwards: Vec<PreferenceGroup> = rows.into_iter().rev().collect();
        assert_same(&what, &gradients(&setup, &config, &[&backwards]), &whole);
    }
}

#[test]
fn completions_that_share_a_prompt_score_as_each_alone() {
    let setup = Setup::moved();
    let rows = lists();
    let shared: Vec<PromptGroup> = rows.iter().map(|row| row.group.clone()).collect();
    let alone = |group: &PromptGroup| -> Vec<PromptGroup> {
        let single = |completion: &Completion| PromptGroup::single(group.prompt.clone(), completion.clone());
        group.completions.iter().map(single).collect()
    };
    let apart: Vec<PromptGroup> = shared.iter().flat_map(alone).collect();
    let found = scores(&setup.reward, &setup.model, &setup.sites, &shared);
    assert_near("shared and alone", &found, &scores(&setup.reward, &setup.model, &setup.sites, &apart), 1e-5);
    // The whole sequence as a completion of nothing ends at the same token.
    let whole = |group: &PromptGroup| {
        let ids = [&group.prompt[..], &group.completions[0].token_ids].concat();
        PromptGroup::single(vec![], Completion::new(ids))
    };
    let whole: Vec<PromptGroup> = apart.iter().map(whole).collect();
    assert_near("without a prompt", &scores(&setup.reward, &setup.model, &setup.sites, &whole), &found, 1e-5);
}

#[test]
fn a_list_weighs_as_a_pair_does_and_an_evaluation_tells_its_pairs() {
    let _turn = take_turns();
    let setup = Setup::moved();
    let config = RewardConfig::default();
    let rows = lists();
    let loss_of = |rows: &[PreferenceGroup]| gradients(&setup, &config, &[rows]).0;
    let each: Vec<f64> = rows.iter().map(|row| loss_of(std::slice::from_ref(row))).collect();
    let mean = each.iter().sum::<f64>() / each.len() as f64;
    assert!((loss_of(&rows) - mean).abs() < 1e-6, "the mean over prompts, each times its weight");

    let mut objective = RewardTraining::new(config.clone(), setup.reward.shared()).unwrap();
    let record = objective.record();
    let mut heard = Vec::new();
    let found = evaluate(&mut objective, &setup.pass(), &rows, 40, &mut |done| heard.push(done)).unwrap();
    assert!((found.loss - mean).abs() < 1e-6 && heard.last() == Some(&rows.len()), "{found:?}");
    let scored = record.held_out(1).unwrap();
    assert!(record.held_out(2).is_none());
    let examples: Vec<usize> = scored.iter().map(|pair| pair.example).collect();
    let expected: Vec<usize> =
        rows.iter().enumerate().flat_map(|(row, group)| vec![row; group.pairs().len()]).collect();
    assert_eq!(examples, expected);
    let right = scored.iter().filter(|pair| pair.difference > 0.0).count() as f64;
    assert_eq!(found.value("accuracy").unwrap(), right / scored.len() as f64);
    assert!(found.value("calibration_error").unwrap() > 0.0);
    let (low, mean, high) =
        (found.value("min_reward").unwrap(), found.value("mean_reward").unwrap(), found.value("max_reward").unwrap());
    assert!(low < mean && mean < high);
}

#[test]
fn a_stopped_and_resumed_run_equals_one_that_was_not_and_remembers_its_scores() {
    let _turn = take_turns();
    let config = TrainConfig::<RewardConfig> {
        max_steps: Some(8),
        learning_rate: 5e-3,
        batch: BatchConfig { batch_size: 4, accumulation: 2, seed: 3, ..Default::default() },
        save_every: 2,
        ..Default::default()
    };
    let run_of = |stop: Option<u64>| {
        let (_folder, run) = new_run();
        let mut records = Vec::new();
        let mut last = None;
        for stop in [stop, None] {
            let setup = Setup::moved();
            let rows = pairs(&fixtures("reward/train_lora"))[..24].to_vec();
            let (_, part, objective) = setup.train(rows, &config, &run, stop);
            records.extend(part);
            let values: Vec<Tensor> = setup.parameters.iter().map(|(_, value)| value.detach().copy()).collect();
            last = Some((values, objective.record().statistics()));
        }
        let losses: Vec<_> = records.iter().map(|record| (record.step, record.loss, record.grad_norm)).collect();
        (losses, last.unwrap())
    };
    let (whole, parts) = (run_of(None), run_of(Some(3)));
    assert_eq!(whole.0, parts.0);
    assert!(whole.1.0.iter().zip(&parts.1.0).all(|(one, other)| one.equal(other)));
    // 8 steps of 8 pairs.
    let statistics = whole.1.1.unwrap();
    assert_eq!((Some(statistics), statistics.count), (parts.1.1, 128));
    // The head was trained, too.
    let losses: Vec<f64> = whole.0.iter().map(|(_, loss, _)| *loss).collect();
    assert!(losses[7] < losses[0], "{losses:?}");
}

/// Words of one letter; `$` ends a turn.
struct Letters;

impl Encode for Letters {
    fn encode(&self, text: &str) -> Result<Vec<i64>, String> {
        Ok(text.chars().map(|letter| i64::from(u32::from(letter))).collect())
    }

    fn decode(&self, token_ids: &[i64]) -> String {
        token_ids.iter().filter_map(|&id| char::from_u32(id as u32)).collect()
    }

    fn render(&self, _: &[Message], _: Option<&Value>, _: bool) -> Result<String, String> {
        Err("no template".into())
    }

    fn stop_ids(&self) -> &[i64] {
        &[36]
    }
}

#[test]
fn a_completion_is_scored_at_the_token_that_ends_its_turn() {
    let mut group = PromptGroup {
        prompt: vec![1],
        completions: ["ab$\n", "ab$", "a$\nb", "ab\n", "a$\nuser\nb$ \n"]
            .map(|text| Completion::new(Letters.encode(text).unwrap()))
            .into(),
    };
    end_at_turn(&mut group, &Letters);
    let texts: Vec<String> = group.completions.iter().map(|completion| Letters.decode(&completion.token_ids)).collect();
    assert_eq!(texts, ["ab$", "ab$", "a$\nb", "ab\n", "a$\nuser\nb$"]);
    assert!(group.completions.iter().all(|completion| completion.token_ids.len() == completion.is_label.len()));
}

#[test]
fn files_that_do_not_fit_are_refused_by_name() {
    let model = tiny("llama");
    let adapter = fixtures("reward/llama_lora/adapter");
    let copy = |name: &str, change: &dyn Fn(&Path)| -> String {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        for entry in std::fs::read_dir(&adapter).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
        }
        change(&folder);
        let error = RewardModel::load_adapter(&folder, &model).unwrap_err();
        format!("{error} {}", error.hint().unwrap_or_default())
    };
    let with_tensors = |folder: &Path, change: &Change<'_>| {
        let file = folder.join("adapter_model.safetensors");
        let reader = SafetensorsReader::open(&file).unwrap();
        let mut tensors: Vec<(String, Tensor)> =
            reader.names().map(|name| (name.to_string(), reader.tensor(name, Device::Cpu).unwrap().copy())).collect();
        drop(reader);
        change(&mut tensors);
        pt_tensor::io::save_safetensors(&file, &tensors, &[]).unwrap();
    };
    let set = |folder: &Path, key: &str, value: Value| {
        let path = folder.join("adapter_config.json");
        let mut config = json(&path);
        config[key] = value;
        std::fs::write(&path, config.to_string()).unwrap();
    };
    const HEAD: &str = "base_model.model.score.weight";
    let text = copy("causal", &|folder| set(folder, "task_type", "CAUSAL_LM".into()));
    assert!(text.contains("causal: its task_type is \"CAUSAL_LM\"") && text.contains("pt reward"), "{text}");
    let text = copy("headless", &|folder| with_tensors(folder, &|all| all.retain(|(name, _)| name != HEAD)));
    assert!(text.contains("headless/adapter_model.safetensors") && text.contains(HEAD), "{text}");
    let wide = |all: &mut Vec<(String, Tensor)>| {
        all.iter_mut()
            .filter(|(name, _)| name == HEAD)
            .for_each(|(_, value)| *value = Tensor::ones([1, 64], (Kind::Float, Device::Cpu)));
    };
    let text = copy("wide", &|folder| with_tensors(folder, &wide));
    assert!(text.contains("[1, 64]") && text.contains("[1, 32]"), "{text}");
    // Of the rest pt-peft speaks, and of the folder that it was asked for.
    let extra = |all: &mut Vec<(String, Tensor)>| all.push(("base_model.model.extra".into(), all[0].1.copy()));
    let text = copy("extra", &|folder| with_tensors(folder, &extra));
    assert!(text.contains("extra/adapter_model.safetensors") && text.contains("base_model.model.extra"), "{text}");
    let text = copy("pickled", &|folder| {
        std::fs::rename(folder.join("adapter_model.safetensors"), folder.join("adapter_model.bin")).unwrap();
    });
    assert!(text.contains("pickle"), "{text}");
    // A head of another model.
    let reward = RewardModel::new(ScalarHead::new(64, 0, Device::Cpu).unwrap());
    let group = PromptGroup::single(vec![1], Completion::new(vec![2]));
    let batch = PackedBatch::new(&[group], Device::Cpu).unwrap();
    let error = reward.scores(&model, &bare(), &batch, RunOptions::default()).unwrap_err().to_string();
    assert!(error.contains("[1, 64]") && error.contains("[1, 32], the model's hidden size"), "{error}");
}

#[test]
fn checkpoints_without_a_head_or_with_more_labels_are_told() {
    let source = fixtures("reward/llama_head/model");
    let copy = |change: &Change<'_>| {
        let place = tempfile::tempdir().unwrap();
        std::fs::copy(source.join("config.json"), place.path().join("config.json")).unwrap();
        let reader = SafetensorsReader::open(source.join("model.safetensors")).unwrap();
        let mut tensors: Vec<(String, Tensor)> =
            reader.names().map(|name| (name.to_string(), reader.tensor(name, Device::Cpu).unwrap())).collect();
        change(&mut tensors);
        pt_tensor::io::save_safetensors(&place.path().join("model.safetensors"), &tensors, &[]).unwrap();
        place
    };
    let place = copy(&|all| all.retain(|(name, _)| name != "score.weight"));
    let error = trunk_of(Pretrained::open(place.path()).unwrap()).unwrap_err().to_string();
    assert!(error.contains("no tensor `score.weight`"), "{error}");
    let place = copy(&|all| {
        all.iter_mut()
            .filter(|(name, _)| name == "score.weight")
            .for_each(|(_, value)| *value = Tensor::cat(&[&*value, &*value], 0));
    });
    let error = RewardModel::of_pretrained(&Pretrained::open(place.path()).unwrap(), Device::Cpu).unwrap_err();
    assert!(error.to_string().contains("`score.weight` has shape [2, 32], expected [1, 32]"), "{error}");
    let place = copy(&|all| all.push(("score.bias".into(), Tensor::ones([1], (Kind::Float, Device::Cpu)))));
    let (_, error) = {
        let pretrained = trunk_of(Pretrained::open(place.path()).unwrap()).unwrap();
        let error = CausalLm::load(&pretrained, Device::Cpu, Kind::Float).unwrap_err();
        (pretrained, error.to_string())
    };
    assert!(error.contains("score.bias"), "{error}");
    // A model that answers has none, and needs no output layer to be a trunk.
    let pretrained = Pretrained::open(fixtures("models/llama_untied/model")).unwrap();
    assert!(RewardModel::of_pretrained(&pretrained, Device::Cpu).unwrap().is_none());
    let model = CausalLm::load(&trunk_of(pretrained).unwrap(), Device::Cpu, Kind::Float).unwrap();
    assert!(!model.named_parameters().unwrap().iter().any(|(name, _)| name.starts_with("lm_head")));
}

#[test]
fn adapters_of_other_methods_keep_a_head_and_those_without_a_place_for_one_are_refused() {
    let model = tiny("llama");
    let reward = RewardModel::new(ScalarHead::new(32, 1, Device::Cpu).unwrap());
    let place = tempfile::tempdir().unwrap();
    let tuning = PromptTuningConfig { num_virtual_tokens: 2, ..Default::default() };
    let tuning: Rc<dyn Adapter> = Rc::new(PromptTuningAdapter::new(tuning, &model, None, 0).unwrap());
    let ia3: Rc<dyn Adapter> = Rc::new(pt_peft::Ia3Adapter::new(pt_peft::Ia3Config::default(), &model).unwrap());
    let bitfit = pt_peft::BitfitConfig {
        target_modules: Some(pt_peft::Modules::Names(vec!["q_proj".into()])),
        ..Default::default()
    };
    let bitfit: Rc<dyn Adapter> = Rc::new(pt_peft::BitfitAdapter::new(bitfit, &model).unwrap());
    for (name, adapter) in [("prompt", tuning), ("ia3", ia3), ("bitfit", bitfit)] {
        let folder = place.path().join(name);
        reward.save_adapter(adapter.as_ref(), &folder).unwrap();
        let (again, _) = RewardModel::load_adapter(&folder, &model).unwrap();
        assert!(again.head.weight().equal(reward.head.weight()), "{name}");
        // Without knowledge of heads it is no adapter of this model.
        assert!(pt_peft::load_adapter(&folder, &model).is_err(), "{name}");
    }
    let bottleneck = pt_peft::BottleneckAdapter::new(Default::default(), &model, 0).unwrap();
    let error = reward.save_adapter(&bottleneck, &place.path().join("bottleneck")).unwrap_err().to_string();
    assert!(error.contains("no place for a reward head") && !place.path().join("bottleneck").exists(), "{error}");
}
