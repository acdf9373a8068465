use crate::common::{Setup, config, fixtures, new_run, rows, take_turns};
use pt_peft::LoraAdapter;
use pt_tensor::io::SafetensorsReader;
use pt_tensor::{Device, Kind};
use pt_train::train::StepRecord;

/// A number of a case.toml.
fn number(case_toml: &str, key: &str) -> f64 {
    let line = case_toml.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix('='));
    line.unwrap().trim().parse().unwrap()
}

fn check(case: &str, setup: &Setup, file_name: impl Fn(&str) -> String) {
    let expected = SafetensorsReader::open(fixtures("sft").join(case).join("expected.safetensors")).unwrap();
    let case_toml = std::fs::read_to_string(fixtures("sft").join(case).join("case.toml")).unwrap();
    let (rtol, atol) = (number(&case_toml, "rtol"), number(&case_toml, "atol"));
    let (_folder, run) = new_run();
    let (outcome, records) = setup.train(rows(), &[], &config(), &run, None);
    assert_eq!(outcome.unwrap().steps, 20);
    #[allow(clippy::type_complexity)]
    let columns: [(&str, fn(&StepRecord) -> f64); 3] =
        [("loss", |r| r.loss), ("grad_norm", |r| r.grad_norm), ("learning_rate", |r| r.learning_rate)];
    for (name, of) in columns {
        let want = Vec::<f64>::try_from(expected.tensor(name, Device::Cpu).unwrap()).unwrap();
        let found: Vec<f64> = records.iter().map(of).collect();
        assert_eq!(found.len(), want.len());
        let worst = found.iter().zip(&want).map(|(f, w)| (f - w).abs() / w.abs().max(atol / rtol)).fold(0.0, f64::max);
        println!("{case}: {name} relative error {worst:.2e}");
        assert!(worst <= rtol, "{case}: {name} is off by {worst:.2e}: {found:?}, TRL has {want:?}");
    }
    // Adam moves an entry by up to the learning rate (1e-3) a step whatever its gradient's size, so one whose gradient
    // is rounding noise may part by a part of a step; the mean is held closer.
    for (name, value) in &setup.parameters {
        let want = expected.tensor(&file_name(name), Device::Cpu).unwrap();
        let error = (value.detach().to_kind(Kind::Double) - want).abs();
        let (max, mean) = (error.max().double_value(&[]), error.mean(Kind::Double).double_value(&[]));
        println!("{case}: {name} max error {max:.2e}, mean {mean:.2e}");
        assert!(max <= 1e-4 && mean <= 1e-6, "{case}: {name} is off by {max:.2e}, {mean:.2e} in the mean");
    }
}

#[test]
fn twenty_lora_steps_equal_those_of_trl() {
    let _turn = take_turns();
    let setup = Setup::lora(|model| LoraAdapter::load(&fixtures("sft/lora/initial_adapter"), model).unwrap());
    check("lora", &setup, |name| format!("final.base_model.model.{name}"));
}

#[test]
fn twenty_steps_of_full_fine_tuning_equal_those_of_trl() {
    let _turn = take_turns();
    check("full", &Setup::full(), |name| format!("final.{name}"));
}
