//! Held-out rows: the loss itself, the best checkpoint, early stopping.

use crate::common::{Setup, config, fixtures, lora_config, new_run, rows, take_turns, tiny_llama};
use pt_model::{Bare, CausalLm, Pretrained, PromptGroup, RunOptions, Sites};
use pt_peft::{Adapter, AdapterSet, LoraAdapter};
use pt_tensor::{Device, Kind, no_grad};
use pt_train::TrainError;
use pt_train::objective::{Evaluation, Pass, evaluate};
use pt_train::schedule::ScheduleConfig;
use pt_train::sft::{Sft, SftConfig};
use pt_train::train::{BestCheckpoint, Ending};
use std::rc::Rc;

/// Learns nothing: a step is far below the precision of the weights, so no evaluation is better than the first.
fn still() -> SftConfig {
    SftConfig { max_steps: Some(20), learning_rate: 1e-30, eval_every: 2, early_stopping: Some(2), ..config() }
}

fn held_out(
    model: &CausalLm,
    sites: &Rc<dyn Sites>,
    rows: &[PromptGroup],
    max_tokens: usize,
) -> pt_train::Result<Evaluation> {
    let pass = Pass { step: 0, model, sites, options: RunOptions::default() };
    evaluate(&mut Sft::default(), &pass, rows, max_tokens, &mut |_| {})
}

#[test]
fn the_held_out_loss_is_taken_without_dropout() {
    let _turn = take_turns();
    let model = tiny_llama();
    let loss = |dropout: f64, is_in_set: bool| {
        let adapter = LoraAdapter::new(lora_config(dropout), &model, 1).unwrap();
        for (_, value) in adapter.parameters().iter().filter(|(name, _)| name.ends_with("lora_B.weight")) {
            let _ = no_grad(|| value.shallow_clone().fill_(0.1));
        }
        adapter.set_training(true);
        let set = AdapterSet::new();
        let adapter = Rc::new(adapter);
        set.insert("one", adapter.clone()).unwrap();
        let sites: Rc<dyn Sites> = if is_in_set { Rc::new(set) } else { adapter };
        let loss = held_out(&model, &sites, &rows()[..10], 100).unwrap().loss;
        assert!(sites.set_training(true), "training goes on as before");
        loss
    };
    assert_eq!(loss(0.5, false), loss(0.0, false));
    assert_eq!(loss(0.5, true), loss(0.0, false));
}

#[test]
fn a_held_out_row_without_a_finite_loss_is_named() {
    let _turn = take_turns();
    let pretrained = Pretrained::open(fixtures("models/llama_untied/model")).unwrap();
    let model = CausalLm::load(&pretrained, Device::Cpu, Kind::Float).unwrap();
    let mut rows = rows()[..6].to_vec();
    let is_known =
        |id: &i64| rows.iter().any(|row| row.prompt.contains(id) || row.completions[0].token_ids.contains(id));
    let token = (0..model.config().vocab_size).find(|id| !is_known(id)).unwrap();
    rows[4].prompt[0] = token;
    let embeddings = model.parameter("model.embed_tokens.weight").unwrap();
    let _ = no_grad(|| embeddings.get(token).fill_(f64::NAN));
    let bare: Rc<dyn Sites> = Rc::new(Bare);
    let error = held_out(&model, &bare, &rows, 1).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("held-out log-probs is not finite") && text.contains("held-out row 4 of 6"), "{text}");
}

#[test]
fn values_that_are_not_finite_reach_neither_best_nor_a_checkpoint() {
    let _turn = take_turns();
    // The first step itself is sound, the weights after it are not.
    let schedule = ScheduleConfig { warmup_steps: Some(0), ..Default::default() };
    let config = SftConfig { learning_rate: 1e39, schedule, eval_every: 1, save_every: 1, ..config() };
    for (held_out, expected) in [(rows()[40..50].to_vec(), "held-out log-probs"), (vec![], "parameter ")] {
        let (_folder, run) = new_run();
        let error = Setup::full().train(rows(), &held_out, &config, &run, None).0.unwrap_err();
        assert!(matches!(&error, TrainError::NonFinite { step: 1, what, .. } if what.starts_with(expected)), "{error}");
        assert!(run.latest().unwrap().is_none() && run.best().unwrap().is_none());
        // With a sound learning rate the same run goes on from what stands.
        let sound = SftConfig { learning_rate: 1e-3, max_steps: Some(2), ..config.clone() };
        assert_eq!(Setup::full().train(rows(), &held_out, &sound, &run, None).0.unwrap().steps, 2);
    }
}

#[test]
fn a_run_without_gain_stops_early_and_names_the_best_beside_the_last() {
    let _turn = take_turns();
    let (_folder, run) = new_run();
    let held_out = rows()[40..50].to_vec();
    let outcome = Setup::full().train(rows(), &held_out, &still(), &run, None).0.unwrap();
    let loss = outcome.evaluation.unwrap().loss;
    // Evaluations at 2 (the best), 4 and 6 (no better).
    assert_eq!((outcome.ending, outcome.steps), (Ending::EarlyStopped, 6));
    assert_eq!(outcome.best, Some(BestCheckpoint { step: 2, loss }));
    assert_eq!(run.checkpoint_steps().unwrap(), [2, 6]);
    assert_eq!(run.best().unwrap().unwrap().step, 2);

    // It is at its end: resuming takes no step, more patience some more.
    let (again, records) = Setup::full().train(rows(), &held_out, &still(), &run, None);
    let again = again.unwrap();
    assert_eq!((again.ending, again.steps, again.best), (Ending::EarlyStopped, 6, outcome.best));
    assert!(records.is_empty());
    let patient = SftConfig { early_stopping: Some(3), ..still() };
    let (outcome, records) = Setup::full().train(rows(), &held_out, &patient, &run, None);
    assert_eq!((outcome.unwrap().ending, records.len()), (Ending::EarlyStopped, 2));
}

#[test]
fn a_run_that_gets_better_is_not_stopped() {
    let _turn = take_turns();
    let (_folder, run) = new_run();
    let config = SftConfig { learning_rate: 1e-3, early_stopping: Some(1), max_steps: Some(8), ..still() };
    let outcome = Setup::full().train(rows(), &rows()[..10], &config, &run, None).0.unwrap();
    assert_eq!((outcome.ending, outcome.steps), (Ending::Done, 8));
    assert_eq!(outcome.best.unwrap().step, 8);
}

#[test]
fn early_stopping_that_could_never_stop_is_refused() {
    let _turn = take_turns();
    for (config, expected) in [
        (SftConfig { early_stopping: Some(0), ..still() }, "early_stopping is 0, expected at least 1"),
        (SftConfig { eval_every: 0, ..still() }, "early_stopping is 2 and eval_every is 0"),
    ] {
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let (_folder, run) = new_run();
    let error = Setup::full().train(rows(), &[], &still(), &run, None).0.unwrap_err().to_string();
    assert!(error.contains("early_stopping is 2, and there is no held-out data"), "{error}");
    still().validate_with(true).unwrap();
}
