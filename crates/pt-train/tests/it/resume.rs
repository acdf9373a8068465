use crate::common::{Setup, config, lora_config, new_run, rows, take_turns};
use pt_peft::LoraAdapter;
use pt_tensor::{AdamWConfig, AdamWVariant};
use pt_train::TrainError;
use pt_train::data::BatchConfig;
use pt_train::run_dir::RunDir;
use pt_train::sft::SftConfig;
use pt_train::train::Ending;
use std::path::Path;

fn settings() -> SftConfig {
    SftConfig {
        max_steps: Some(10),
        batch: BatchConfig { batch_size: 3, accumulation: 2, shuffle: true, seed: 1, max_tokens: Some(40) },
        eval_every: 2,
        ..config()
    }
}

fn setup(is_lora: bool) -> Setup {
    match is_lora {
        true => Setup::lora(|model| LoraAdapter::new(lora_config(0.2), model, 11).unwrap()),
        false => Setup::full(),
    }
}

/// metrics.jsonl without what a clock or the operating system says.
fn metrics(run: &RunDir) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(run.metrics_path()).unwrap();
    text.lines()
        .map(|line| {
            let mut record: serde_json::Value = serde_json::from_str(line).unwrap();
            let fields = record.as_object_mut().unwrap();
            for name in ["tokens_per_second", "memory_bytes"] {
                fields.remove(name);
            }
            record
        })
        .collect()
}

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Stops after each of `stops`, each time with everything built anew, and compares with the run that went through.
fn check(is_lora: bool, config: &SftConfig, stops: &[u64]) {
    check_through(is_lora, config, config, stops);
}

/// As [`check`], with other settings before the last stop than after it and in the run that went through.
fn check_through(is_lora: bool, before: &SftConfig, config: &SftConfig, stops: &[u64]) {
    // Rows enough for a third of an epoch: the order of the second epoch must continue as well.
    let (train, held_out): (Vec<_>, Vec<_>) = (rows()[..25].to_vec(), rows()[40..50].to_vec());
    let (_straight_folder, straight_run) = new_run();
    let straight = setup(is_lora);
    straight.train(train.clone(), &held_out, config, &straight_run, None).0.unwrap();

    let (_folder, run) = new_run();
    for &stop in stops {
        let part = setup(is_lora);
        let outcome = part.train(train.clone(), &held_out, before, &run, Some(stop)).0.unwrap();
        assert_eq!((outcome.ending, outcome.steps), (Ending::Interrupted, stop));
        assert_eq!(run.latest().unwrap().unwrap().0, stop);
    }
    let resumed = setup(is_lora);
    let outcome = resumed.train(train, &held_out, config, &run, None).0.unwrap();
    assert_eq!((outcome.ending, outcome.steps), (Ending::Done, 10));

    for ((name, value), (_, expected)) in resumed.values().iter().zip(&straight.values()) {
        assert_eq!(value, expected, "{name} differs after resuming");
    }
    assert_eq!(metrics(&run), metrics(&straight_run));
    assert_eq!(run.best().unwrap(), straight_run.best().unwrap());
    let files = ["trainer_state.json", "trainer_state.safetensors", "adapter/adapter_model.safetensors"];
    for file in &files[..if is_lora { 3 } else { 2 }] {
        let at = |run: &RunDir| bytes(&run.checkpoint_path(10).join(file));
        assert!(at(&run) == at(&straight_run), "{file} differs after resuming");
    }
}

#[test]
fn a_stopped_and_resumed_lora_run_with_dropout_equals_an_unbroken_one_bit_for_bit() {
    let _turn = take_turns();
    check(true, &settings(), &[5]);
    check(true, &settings(), &[1, 4, 9]);
}

#[test]
fn a_stopped_and_resumed_full_run_equals_an_unbroken_one_bit_for_bit() {
    let _turn = take_turns();
    check(false, &settings(), &[5]);
    check(false, &settings(), &[3, 6]);
}

#[test]
fn runs_with_8_bit_and_paged_states_resume_bit_for_bit_and_as_one_another() {
    let _turn = take_turns();
    use AdamWVariant::{Adamw, Adamw8bit, PagedAdamw, PagedAdamw8bit};
    let of = |variant| SftConfig { adamw: AdamWConfig { variant, ..settings().adamw }, ..settings() };
    for (plain, paged) in [(Adamw, PagedAdamw), (Adamw8bit, PagedAdamw8bit)] {
        check(false, &of(paged), &[5]);
        check_through(false, &of(plain), &of(paged), &[5]);
        check_through(false, &of(paged), &of(plain), &[3, 6]);
    }
    check(false, &of(Adamw8bit), &[4]);
    // In other bits it is another state.
    let (_folder, run) = new_run();
    setup(false).train(rows(), &[], &of(Adamw), &run, Some(2)).0.unwrap();
    let error = setup(false).train(rows(), &[], &of(Adamw8bit), &run, None).0.unwrap_err();
    assert!(matches!(error, TrainError::StateMismatch { .. }), "{error}");
    assert!(error.to_string().contains("exp_avg.codes"), "{error}");
    // Nothing is left behind in the run's folder.
    let names: Vec<String> =
        std::fs::read_dir(run.root()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(names.iter().all(|name| !name.starts_with(".tmp")), "{names:?}");
}

#[test]
fn a_run_with_checkpointed_activations_resumes_bit_for_bit_too() {
    let _turn = take_turns();
    check(true, &SftConfig { activation_checkpointing: true, ..settings() }, &[5]);
}

#[test]
fn a_run_that_is_done_stays_as_it_is() {
    let _turn = take_turns();
    let (_folder, run) = new_run();
    setup(true).train(rows(), &[], &settings(), &run, None).0.unwrap();
    let before = metrics(&run);
    let again = setup(true);
    let (outcome, records) = again.train(rows(), &[], &settings(), &run, None);
    assert_eq!(outcome.unwrap().steps, 10);
    assert!(records.is_empty());
    assert_eq!(metrics(&run), before);
}

#[test]
fn a_best_checkpoint_that_a_crash_left_unnamed_is_named_on_resuming() {
    let _turn = take_turns();
    let (_folder, run) = new_run();
    let (train, held_out) = (rows(), rows()[40..50].to_vec());
    setup(true).train(train.clone(), &held_out, &settings(), &run, Some(6)).0.unwrap();
    let best = run.best().unwrap().unwrap();
    assert_eq!(best.step, 6, "the loss falls from one evaluation to the next");
    // The process died after the checkpoint and before its name was written.
    std::fs::remove_file(run.checkpoints().join("best.json")).unwrap();
    setup(true).train(train, &held_out, &SftConfig { max_steps: Some(6), ..settings() }, &run, None).0.unwrap();
    assert_eq!(run.best().unwrap(), Some(best));
}

#[test]
fn other_rows_are_refused_on_resuming() {
    let _turn = take_turns();
    let (_folder, run) = new_run();
    setup(true).train(rows(), &[], &settings(), &run, Some(2)).0.unwrap();
    let mut others = rows();
    others[7].completions[0].is_label[1] = false;
    let error = setup(true).train(others, &[], &settings(), &run, None).0.unwrap_err();
    assert!(error.to_string().contains("other training rows"), "{error}");
    assert_eq!(run.latest().unwrap().unwrap().0, 2);
}
