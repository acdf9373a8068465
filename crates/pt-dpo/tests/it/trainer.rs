//! Equalities of the trainer: prompts shared or not, any order and split, references live or kept, stops.

use crate::common::{Setup, examples, fixtures, new_run, take_turns, tiny_llama};
use pt_dpo::{
    Dpo, DpoConfig, DpoError, DpoExample, Loss, LossConfig, NllAverage, PairBatch, PairLogps, PolicyCopy, Reference,
    load_reference, precompute, preference_loss, save_reference,
};
use pt_model::{Bare, Completion, PackedBatch, PromptGroup, RunOptions, Sites};
use pt_peft::{LoraAdapter, LoraConfig};
use pt_tensor::{Device, Kind, LabelLogprobs, Tensor, no_grad};
use pt_train::data::{BatchConfig, Judgement, PreferenceGroup, Scores};
use pt_train::objective::{Example as _, Objective, Pass, evaluate};
use pt_train::settings::TrainConfig;
use pt_train::train::{Ending, StepRecord};
use std::collections::BTreeMap;
use std::rc::Rc;

/// The pairs of `fixtures/dpo_train`.
fn groups(count: usize) -> Vec<PromptGroup> {
    let text = std::fs::read_to_string(fixtures("dpo_train/lora/rows.jsonl")).unwrap();
    let group = |line: &str| {
        let mut row: BTreeMap<String, Vec<i64>> = serde_json::from_str(line).unwrap();
        let mut take = |key: &str| row.remove(key).unwrap();
        let completions = ["chosen_ids", "rejected_ids"].map(|side| Completion::new(take(side)));
        PromptGroup { prompt: take("prompt_ids"), completions: completions.into() }
    };
    text.lines().take(count).map(group).collect()
}

fn setup() -> Setup {
    let config = LoraConfig { rank: 4, lora_alpha: 8.0, ..Default::default() };
    let setup = Setup::lora(tiny_llama(), |model| LoraAdapter::new(config, model, 3).unwrap());
    // Away from the start, where policy and reference are one.
    for (name, value) in setup.parameters.iter().filter(|(name, _)| name.contains("lora_B")) {
        let size = value.size();
        let count: i64 = size.iter().product();
        let ramp = Tensor::arange(count, (Kind::Float, Device::Cpu)).view(&size[..]).sin() * 0.05;
        no_grad(|| value.shallow_clone().copy_(&ramp));
        assert!(value.requires_grad(), "{name}");
    }
    setup
}

fn bare() -> Reference {
    Reference::Sites(Rc::new(Bare))
}

fn pass<'a>(setup: &'a Setup) -> Pass<'a> {
    Pass { step: 1, model: &setup.model, sites: &setup.sites, options: RunOptions::default() }
}

/// Loss and gradients of one window, cut into micro-batches as given.
fn gradients(setup: &Setup, loss: &LossConfig, reference: Reference, window: &[&[DpoExample]]) -> (f64, Vec<Tensor>) {
    let mut objective = Dpo::new(loss.clone(), reference).unwrap();
    let micro_batches: Vec<Vec<&DpoExample>> = window.iter().map(|rows| rows.iter().collect()).collect();
    let record = objective.accumulate(&pass(setup), &micro_batches).unwrap();
    let take = |(_, tensor): &(String, Tensor)| {
        let mut tensor = tensor.shallow_clone();
        let gradient = tensor.grad().copy();
        tensor.zero_grad();
        gradient
    };
    (record.loss, setup.parameters.iter().map(take).collect())
}

fn assert_near(what: &str, one: &(f64, Vec<Tensor>), other: &(f64, Vec<Tensor>)) {
    assert!((one.0 / other.0 - 1.0).abs() <= 1e-6, "{what}: losses {} and {}", one.0, other.0);
    let norm = |tensors: &[Tensor]| {
        tensors.iter().map(|tensor| tensor.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt()
    };
    let apart: Vec<Tensor> = one.1.iter().zip(&other.1).map(|(a, b)| a - b).collect();
    let relative = norm(&apart) / norm(&other.1);
    assert!(norm(&other.1) > 1e-3, "{what}: there is a gradient to compare");
    assert!(relative <= 1e-5, "{what}: gradients part by {relative:.2e}");
}

#[test]
fn a_shared_prompt_equals_two_separate_sequences() {
    let _turn = take_turns();
    let setup = setup();
    let config = LossConfig::default();
    let groups = groups(6);
    let shared = gradients(&setup, &config, bare(), &[&examples(&groups, &config)]);
    // Each side a sequence of its own, the plain way.
    let side = |index: usize, sites: &Rc<dyn Sites>| -> Tensor {
        let alone = |group: &PromptGroup| PromptGroup::single(group.prompt.clone(), group.completions[index].clone());
        let batch = PackedBatch::new(&groups.iter().map(alone).collect::<Vec<_>>(), Device::Cpu).unwrap();
        let options = LabelLogprobs::default();
        let out = setup.model.label_logprobs(&batch, sites, RunOptions::default(), &options).unwrap();
        batch.sum_by_completion(&out.logprobs)
    };
    let logps = |sites: &Rc<dyn Sites>| PairLogps { chosen_logps: side(0, sites), rejected_logps: side(1, sites) };
    let reference: Rc<dyn Sites> = Rc::new(Bare);
    let pairs = PairBatch::new(logps(&setup.sites)).with_reference(no_grad(|| logps(&reference)));
    let loss = preference_loss(&config, &pairs).unwrap().losses.mean(Kind::Float);
    loss.backward();
    let apart = setup.parameters.iter().map(|(_, tensor)| tensor.grad().copy()).collect();
    setup.parameters.iter().for_each(|(_, tensor)| tensor.shallow_clone().zero_grad());
    assert_near("shared and apart", &shared, &(loss.double_value(&[]), apart));
}

#[test]
fn neither_the_order_nor_the_split_of_a_window_changes_its_gradient() {
    let _turn = take_turns();
    let setup = setup();
    for config in [
        LossConfig { nll_weight: Some(0.5), ..LossConfig::default() },
        LossConfig::of(Loss::Simpo),
        LossConfig { ld_alpha: Some(0.3), ..LossConfig::default() },
        LossConfig { wpo: true, ..LossConfig::default() },
    ] {
        let what = format!("{config:?}");
        let reference = || if config.needs_reference() { bare() } else { Reference::Absent };
        let rows = examples(&groups(8), &config);
        let whole = gradients(&setup, &config, reference(), &[&rows]);
        let parts = gradients(&setup, &config, reference(), &[&rows[..3], &rows[3..4], &rows[4..]]);
        assert_near(&what, &parts, &whole);
        let backwards: Vec<DpoExample> = rows.into_iter().rev().collect();
        assert_near(&what, &gradients(&setup, &config, reference(), &[&backwards]), &whole);
    }
}

#[test]
fn a_ranked_list_is_the_mean_over_its_pairs() {
    let _turn = take_turns();
    let setup = setup();
    let config = LossConfig::default();
    let [one, two] = &groups(2)[..] else { unreachable!() };
    // Three completions of one prompt: the last two are tied.
    let all = [&one.completions[..], &two.completions[..1]].concat();
    let group = PromptGroup { prompt: one.prompt.clone(), completions: all.clone() };
    let judgement = Judgement::Ranks { ranks: vec![0, 1, 1], scores: None };
    let list = DpoExample::from_groups(vec![PreferenceGroup { group, judgement, weight: 1.0 }], &config, 1000).unwrap();
    let pair = |index: usize| PromptGroup {
        prompt: one.prompt.clone(),
        completions: vec![all[0].clone(), all[index].clone()],
    };
    let pairs = examples(&[pair(1), pair(2)], &config);
    let list = gradients(&setup, &config, bare(), &[&list]);
    assert_near("list and pairs", &list, &gradients(&setup, &config, bare(), &[&pairs]));
}

#[test]
fn a_kept_reference_equals_a_live_one_and_other_rows_are_refused() {
    let _turn = take_turns();
    let setup = setup();
    for config in [LossConfig::default(), LossConfig::of(Loss::Kto)] {
        let mut rows = judged(&config);
        let live = gradients(&setup, &config, bare(), &[&rows]);
        precompute(&bare(), &setup.model, &setup.sites, &mut rows, 40, &mut |_| ()).unwrap();
        let kept = gradients(&setup, &config, Reference::Precomputed, &[&rows[..3], &rows[3..]]);
        assert_near("kept and live", &kept, &live);

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("reference_logps.safetensors");
        save_reference(&path, [&rows, &[]], "bare").unwrap();
        let mut read = judged(&config);
        load_reference(&path, [&mut read, &mut []], "bare").unwrap();
        assert!(rows.iter().zip(&read).all(|(one, other)| one.reference == other.reference && one.reference.is_some()));
        let error = load_reference(&path, [&mut read, &mut []], "other").unwrap_err().to_string();
        assert!(error.contains("of another reference"), "{error}");
        let error = load_reference(&path, [&mut read[1..], &mut []], "bare").unwrap_err().to_string();
        assert!(error.contains("other train rows"), "{error}");
        // Rows without kept log-probs are told, not taken for zeros.
        let mut objective = Dpo::new(config.clone(), Reference::Precomputed).unwrap();
        let error = objective.accumulate(&pass(&setup), &[judged(&config).iter().collect()]).unwrap_err().to_string();
        assert!(error.contains("has 0 log-probs"), "{error}");
    }
}

/// Pairs, or for KTO their sides as labelled completions.
fn judged(config: &LossConfig) -> Vec<DpoExample> {
    if !config.is_unpaired() {
        return examples(&groups(6), config);
    }
    let label = |(index, group): (usize, PromptGroup)| PreferenceGroup {
        group: PromptGroup::single(group.prompt.clone(), group.completions[index % 2].clone()),
        judgement: Judgement::Labels(vec![index % 2 == 0]),
        weight: 1.0,
    };
    DpoExample::from_groups(groups(6).into_iter().enumerate().map(label).collect(), config, 1000).unwrap()
}

#[test]
fn ktos_point_of_reference_is_that_of_the_whole_window() {
    let _turn = take_turns();
    let setup = setup();
    let config = LossConfig { beta: 1.0, ..LossConfig::of(Loss::Kto) };
    let rows = judged(&config);
    let mismatched = rows[0].mismatched.as_ref().unwrap();
    assert_eq!(
        (&mismatched.prompt, &mismatched.completions[0]),
        (&rows[0].group().prompt, &rows[1].group().completions[0])
    );
    let whole = gradients(&setup, &config, bare(), &[&rows]);
    assert_near("kto", &gradients(&setup, &config, bare(), &[&rows[..1], &rows[1..]]), &whole);
    let mut objective = Dpo::new(config, bare()).unwrap();
    let evaluation = evaluate(&mut objective, &pass(&setup), &rows, 30, &mut |_| ()).unwrap();
    assert!((evaluation.loss / whole.0 - 1.0).abs() < 1e-6, "{evaluation:?}");
    assert!(evaluation.value("kl").is_some_and(|kl| kl >= 0.0));
}

#[test]
fn a_mismatched_completion_is_of_another_prompt_and_fits() {
    let config = LossConfig::of(Loss::Kto);
    let row = |prompt: i64, completion: &[i64]| PreferenceGroup {
        group: PromptGroup::single(vec![prompt; 3], Completion::new(completion.to_vec())),
        judgement: Judgement::Labels(vec![true]),
        weight: 1.0,
    };
    let rows = vec![row(1, &[10, 11]), row(1, &[12]), row(2, &[20, 21, 22, 23]), row(3, &[30]), row(1, &[13])];
    let found = DpoExample::from_groups(rows.clone(), &config, 6).unwrap();
    let completions: Vec<&[i64]> =
        found.iter().map(|row| &row.mismatched.as_ref().unwrap().completions[0].token_ids[..]).collect();
    assert_eq!(completions, [&[20i64, 21, 22][..], &[20, 21, 22], &[30], &[13], &[20, 21, 22]]);
    assert!(found.iter().all(|row| row.mismatched.as_ref().unwrap().prompt == row.group().prompt));
    let error = DpoExample::from_groups(rows[..2].to_vec(), &config, 6).unwrap_err();
    assert!(matches!(error, DpoError::OnePrompt { num_rows: 2 }), "{error}");
    assert!(error.hint().unwrap().contains("apo_zero_unpaired"));
}

#[test]
fn ktos_margin_is_that_of_the_whole_window() {
    let _turn = take_turns();
    let setup = setup();
    let config = LossConfig { beta: 1.0, ..LossConfig::of(Loss::Kto) };
    let rows = judged(&config);
    let margin = |window: &[Vec<&DpoExample>]| {
        let record = Dpo::new(config.clone(), bare()).unwrap().accumulate(&pass(&setup), window).unwrap();
        record.values.iter().find(|(name, _)| *name == "rewards/margins").unwrap().1
    };
    let whole = margin(&[rows.iter().collect()]);
    // Desirable and undesirable rows take turns, so that each part has one side only.
    let apart = margin(&rows.iter().map(|row| vec![row]).collect::<Vec<_>>());
    assert!(whole.abs() > 1e-4 && (apart / whole - 1.0).abs() < 1e-4, "{whole} and {apart}");
}

#[test]
fn ld_dpo_leaves_the_chosen_nll_alone() {
    let _turn = take_turns();
    let setup = setup();
    for nll_average in [NllAverage::Tokens, NllAverage::Sequences] {
        let loss = |nll_weight: f64, ld_alpha: Option<f64>| {
            let config = LossConfig { nll_weight: Some(nll_weight), nll_average, ld_alpha, ..LossConfig::default() };
            let rows = examples(&groups(6), &config);
            gradients(&setup, &config, bare(), &[&rows[..2], &rows[2..]]).0
        };
        let nll = |ld_alpha| loss(1.0, ld_alpha) - loss(0.0, ld_alpha);
        let (plain, with_ld) = (nll(None), nll(Some(0.0)));
        assert!(plain > 0.1 && (with_ld / plain - 1.0).abs() < 1e-5, "{nll_average:?}: {with_ld} is not {plain}");
    }
}

#[test]
fn stated_margins_count_and_scores_do_where_the_settings_say() {
    let _turn = take_turns();
    let setup = setup();
    let loss = |scores: Option<Scores>, margin_scale: f64| {
        let config = LossConfig { margin_scale, ..LossConfig::default() };
        let judgement = Judgement::Ranks { ranks: vec![0, 1], scores };
        let group = groups(1).remove(0);
        let row = PreferenceGroup { group, judgement, weight: 1.0 };
        gradients(&setup, &config, bare(), &[&DpoExample::from_groups(vec![row], &config, 1000).unwrap()]).0
    };
    let scores = || Some([9.0, 1.0].into_iter().collect());
    assert_eq!(loss(scores(), 0.0), loss(None, 0.0));
    assert_eq!(loss(scores(), 0.25), loss(Some(Scores::of_margin(2.0)), 0.0));
    assert!(loss(scores(), 0.25) > loss(None, 0.0) + 1.0);
}

fn config() -> TrainConfig<DpoConfig> {
    TrainConfig {
        max_steps: Some(8),
        learning_rate: 5e-3,
        batch: BatchConfig { batch_size: 4, accumulation: 2, seed: 3, ..Default::default() },
        save_every: 2,
        ..Default::default()
    }
}

/// A run of its own, stopped after some steps and resumed with everything made anew.
fn trained(
    config: &TrainConfig<DpoConfig>,
    reference: fn(&Setup) -> Reference,
    stop: Option<u64>,
) -> (Vec<StepRecord>, Vec<Tensor>) {
    let (_folder, run) = new_run();
    let mut records = Vec::new();
    for stop in [stop, None] {
        let setup = setup();
        let rows = examples(&groups(24), &config.objective.loss);
        let (outcome, part) = setup.train(rows, &[], config, &run, reference(&setup), stop);
        records.extend(part);
        if outcome.ending == Ending::Done {
            return (records, setup.values());
        }
    }
    panic!("the second run goes to the end");
}

#[test]
fn a_stopped_and_resumed_run_equals_one_that_was_not() {
    let _turn = take_turns();
    let following = |setup: &Setup| Reference::Copy(PolicyCopy::new(&setup.parameters, 2, 0.5));
    for (what, reference) in
        [("adapter off", (|_| bare()) as fn(&Setup) -> Reference), ("a copy that follows", following)]
    {
        let whole = trained(&config(), reference, None);
        let parts = trained(&config(), reference, Some(3));
        let losses = |records: &[StepRecord]| records.iter().map(|r| (r.step, r.loss, r.grad_norm)).collect::<Vec<_>>();
        assert_eq!(losses(&whole.0), losses(&parts.0), "{what}");
        assert!(whole.1.iter().zip(&parts.1).all(|(one, other)| one.equal(other)), "{what}");
    }
}

#[test]
fn a_copy_of_the_policy_stays_and_follows_when_asked() {
    let _turn = take_turns();
    let setup = setup();
    let config = LossConfig::default();
    let rows = examples(&groups(4), &config);
    let loss = |objective: &mut Dpo| objective.evaluate(&pass(&setup), &rows, 100, &mut |_| ()).unwrap().loss;
    let copy = |every, mixup| Reference::Copy(PolicyCopy::new(&setup.parameters, every, mixup));
    let (mut still, mut follows) =
        (Dpo::new(config.clone(), copy(0, 1.0)).unwrap(), Dpo::new(config.clone(), copy(2, 1.0)).unwrap());
    let (_, before) = &setup.parameters[0];
    let before = before.detach().copy();
    assert!((loss(&mut still) - 2f64.ln()).abs() < 1e-6, "the policy is its own reference");
    assert!(setup.parameters[0].1.detach().equal(&before), "the policy stands again after the reference's pass");
    for (_, value) in &setup.parameters {
        let _ = no_grad(|| value.shallow_clone().g_mul_scalar_(1.5));
    }
    let moved = loss(&mut still);
    assert!((moved - 2f64.ln()).abs() > 1e-4, "{moved}");
    follows.after_update(1).unwrap();
    assert_eq!(loss(&mut follows), moved);
    follows.after_update(2).unwrap();
    assert!((loss(&mut follows) - 2f64.ln()).abs() < 1e-6);
}
