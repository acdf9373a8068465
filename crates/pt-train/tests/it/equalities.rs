use crate::common::{Setup, config, lora_config, new_run, rows, take_turns};
use pt_peft::LoraAdapter;
use pt_tensor::Kind;
use pt_train::data::BatchConfig;
use pt_train::sft::{Sft, SftConfig, SftLoss};
use pt_train::train::StepRecord;

/// Losses, gradient norms and final weights of ten steps over windows of eight rows, split as `batch` says.
fn run_with(batch: BatchConfig, is_lora: bool, is_checkpointed: bool) -> (Vec<StepRecord>, Setup) {
    let setup = match is_lora {
        true => Setup::lora(|model| LoraAdapter::new(lora_config(0.0), model, 3).unwrap()),
        false => Setup::full(),
    };
    let config = SftConfig { max_steps: Some(10), batch, activation_checkpointing: is_checkpointed, ..config() };
    let (_folder, run) = new_run();
    let (outcome, records) = setup.train(rows(), &[], &config, &run, None);
    outcome.unwrap();
    (records, setup)
}

fn split(batch_size: usize, accumulation: usize, max_tokens: Option<usize>) -> BatchConfig {
    BatchConfig { batch_size, accumulation, max_tokens, shuffle: true, seed: 5 }
}

fn check_equal(what: &str, one: &(Vec<StepRecord>, Setup), other: &(Vec<StepRecord>, Setup)) {
    assert_eq!(one.0.len(), other.0.len());
    for (a, b) in one.0.iter().zip(&other.0) {
        assert!((a.loss - b.loss).abs() <= 1e-6, "{what}: step {}: loss {} and {}", a.step, a.loss, b.loss);
        assert!((a.grad_norm / b.grad_norm - 1.0).abs() <= 1e-5, "{what}: step {}: {a:?} and {b:?}", a.step);
        assert_eq!(a.learning_rate, b.learning_rate);
    }
    for ((name, a), (_, b)) in one.1.parameters.iter().zip(&other.1.parameters) {
        let error = (a.detach() - b.detach()).abs().mean(Kind::Double).double_value(&[]);
        assert!(error <= 1e-6, "{what}: {name} parts by {error:.2e} in the mean");
    }
}

#[test]
fn accumulation_and_token_limits_do_not_change_a_run() {
    let _turn = take_turns();
    for is_lora in [true, false] {
        let whole = run_with(split(8, 1, None), is_lora, false);
        // Rows differ in how many tokens they train, so a mean of means would show.
        for (batch_size, accumulation, max_tokens) in
            [(1, 8, None), (4, 2, None), (2, 4, None), (8, 1, Some(30)), (4, 2, Some(1))]
        {
            let parts = run_with(split(batch_size, accumulation, max_tokens), is_lora, false);
            check_equal(&format!("{batch_size} x {accumulation}, {max_tokens:?} tokens"), &whole, &parts);
        }
    }
}

#[test]
fn dynamic_fine_tuning_weighs_a_token_by_its_probability() {
    let _turn = take_turns();
    // A row with one label: the gradient is that of −log p, times p.
    let mut row = rows()[0].clone();
    row.completions[0].token_ids.truncate(1);
    row.completions[0].is_label = vec![true];
    let first_step = |loss: SftLoss| {
        let objective = Sft { loss };
        let batch = split(1, 1, None);
        let config = SftConfig { max_steps: Some(1), batch, max_grad_norm: None, objective, ..config() };
        let (_folder, run) = new_run();
        let (outcome, records) = Setup::full().train(vec![row.clone()], &[], &config, &run, None);
        outcome.unwrap();
        records[0].clone()
    };
    let (nll, dft) = (first_step(SftLoss::Nll), first_step(SftLoss::Dft));
    let probability = (-nll.loss).exp();
    assert!((dft.loss / (probability * nll.loss) - 1.0).abs() < 1e-5, "{dft:?} and {nll:?}");
    assert!((dft.grad_norm / (probability * nll.grad_norm) - 1.0).abs() < 1e-5, "{dft:?} and {nll:?}");
}

#[test]
fn activation_checkpointing_does_not_change_a_run() {
    let _turn = take_turns();
    for is_lora in [true, false] {
        let plain = run_with(split(4, 2, None), is_lora, false);
        check_equal("checkpointed", &plain, &run_with(split(4, 2, None), is_lora, true));
    }
}
