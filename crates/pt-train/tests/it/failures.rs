use crate::common::{Setup, config, lora_config, new_run, rows, take_turns};
use pt_peft::LoraAdapter;
use pt_tensor::no_grad;
use pt_train::TrainError;
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
