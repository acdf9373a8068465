use crate::common::{Setup, config, lora_config, new_run, rows, take_turns};
use pt_peft::{LoraAdapter, LoraConfig, Modules};
use pt_tensor::{AdamWConfig, no_grad};
use pt_train::TrainError;
use pt_train::data::BatchConfig;
use pt_train::sft::SftConfig;

fn lora() -> Setup {
    Setup::lora(|model| LoraAdapter::new(lora_config(0.0), model, 0).unwrap())
}

#[test]
fn a_loss_that_is_not_finite_stops_with_the_place_and_the_last_checkpoint_stands() {
    let _turn = take_turns();
    let (_folder, run) = new_run();
    let config = SftConfig { save_every: 1, ..config() };
    lora().train(rows(), &[], &config, &run, Some(3)).0.unwrap();

    // The fourth step meets a model whose last norm has gone bad.
    let broken = lora();
    let norm = broken.model.parameter("model.norm.weight").unwrap();
    let _ = no_grad(|| norm.shallow_clone().fill_(f64::NAN));
    let error = broken.train(rows(), &[], &config, &run, None).0.unwrap_err();
    match &error {
        TrainError::NonFinite { step: 4, what, place } => {
            assert_eq!(what, "log-probs");
            assert!(place.starts_with("entry 0 of log-probs ["), "{place}");
        }
        other => panic!("{other}"),
    }
    assert!(error.hint().unwrap().contains("learning_rate"));

    // What stands is the third step, whole: a sound model goes on from it.
    assert_eq!(run.checkpoint_steps().unwrap().last(), Some(&3));
    let (outcome, records) = lora().train(rows(), &[], &config, &run, Some(5));
    assert_eq!(outcome.unwrap().steps, 5);
    assert_eq!(records[0].step, 4);
    assert!(records.iter().all(|record| record.loss.is_finite() && record.grad_norm.is_finite()));
}

#[test]
fn gradients_whose_norm_is_not_finite_update_nothing() {
    let _turn = take_turns();
    let (_folder, run) = new_run();
    let setup = lora();
    // B is zero, so the outputs are sound; its gradient is of the size of A, whose square leaves f32.
    let (name, factor) = &setup.parameters[0];
    assert!(name.ends_with("lora_A.weight"), "{name}");
    let _ = no_grad(|| factor.shallow_clone().fill_(1e30));
    let before = setup.values();
    let error = setup.train(rows(), &[], &config(), &run, None).0.unwrap_err();
    match &error {
        TrainError::NonFinite { step: 1, what, place } => {
            assert_eq!((what.as_str(), place.as_str()), ("gradient", "the norm of all gradients"));
        }
        other => panic!("{other}"),
    }
    for ((name, value), (_, expected)) in setup.values().iter().zip(&before) {
        assert_eq!(value, expected, "{name} was updated");
    }
    assert!(run.latest().unwrap().is_none());
}

#[test]
fn settings_of_the_optimizer_that_break_it_are_refused_by_name() {
    let adamw = AdamWConfig { beta1: 1.0, beta2: f64::NAN, eps: 0.0, weight_decay: -0.1, ..Default::default() };
    let batch = BatchConfig { batch_size: usize::MAX, accumulation: 2, ..Default::default() };
    let error = SftConfig { adamw, batch, ..config() }.validate().unwrap_err().to_string();
    for fault in [
        "adamw.beta1 is 1, expected from 0 to under 1",
        "adamw.beta2 is NaN, expected from 0 to under 1",
        "adamw.eps is 0, expected over 0",
        "adamw.weight_decay is -0.1, expected at least 0",
        "times accumulation 2 is too large a number",
    ] {
        assert!(error.contains(fault), "{error}");
    }
}

#[test]
fn a_checkpoint_of_other_layers_is_refused_on_resuming() {
    let _turn = take_turns();
    let (_folder, run) = new_run();
    lora().train(rows(), &[], &config(), &run, Some(2)).0.unwrap();
    let fewer = LoraConfig { target_modules: Modules::Names(vec!["q_proj".into()]), ..lora_config(0.0) };
    let setup = Setup::lora(|model| LoraAdapter::new(fewer, model, 0).unwrap());
    let error = setup.train(rows(), &[], &config(), &run, None).0.unwrap_err();
    match &error {
        TrainError::StateMismatch { missing, unexpected } => {
            assert!(missing.is_empty());
            assert!(unexpected.iter().any(|name| name.contains("v_proj.lora_A")), "{unexpected:?}");
        }
        other => panic!("{other}"),
    }
    assert!(error.to_string().contains("more") && error.hint().is_some(), "{error}");
    assert_eq!(run.latest().unwrap().unwrap().0, 2);
}
