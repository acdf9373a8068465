//! Adapter folders: what is written, and what is refused by name.

use crate::{fixtures, tiny};
use pt_peft::{Adapter, CONFIG_FILE, LoraAdapter, LoraConfig, MethodConfig, PeftError, TENSOR_FILE, load_adapter};
use pt_tensor::io::{SafetensorsReader, save_safetensors};
use pt_tensor::{Device, Tensor};
use std::path::Path;

/// A copy of PEFT's plain adapter with one change to its tensors.
fn changed(folder: &Path, change: impl Fn(&mut Vec<(String, Tensor)>)) {
    let plain = fixtures().join("lora/plain/adapter");
    std::fs::copy(plain.join(CONFIG_FILE), folder.join(CONFIG_FILE)).unwrap();
    let reader = SafetensorsReader::open(plain.join(TENSOR_FILE)).unwrap();
    let mut tensors: Vec<(String, Tensor)> =
        reader.names().map(|name| (name.to_string(), reader.tensor(name, Device::Cpu).unwrap())).collect();
    change(&mut tensors);
    save_safetensors(&folder.join(TENSOR_FILE), &tensors, &[]).unwrap();
}

fn load_changed(change: impl Fn(&mut Vec<(String, Tensor)>)) -> PeftError {
    let folder = tempfile::tempdir().unwrap();
    changed(folder.path(), change);
    LoraAdapter::load(folder.path(), &tiny("llama")).unwrap_err()
}

#[test]
fn adapters_of_peft_are_written_back_with_the_same_tensors_and_settings() {
    for case in std::fs::read_dir(fixtures().join("lora")).unwrap() {
        let case = case.unwrap().path();
        let base = std::fs::read_to_string(case.join("case.toml")).unwrap();
        let base = base.lines().find_map(|line| line.strip_prefix("base = ")).unwrap().trim_matches('"').to_string();
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("new/copy");
        let adapter = LoraAdapter::load(&case.join("adapter"), &tiny(&base)).unwrap();
        if adapter.is_saved_converted() {
            continue;
        }
        adapter.save(&copy).unwrap();
        let [ours, theirs] =
            [&copy, &case.join("adapter")].map(|f| SafetensorsReader::open(f.join(TENSOR_FILE)).unwrap());
        // Tables that PEFT copies from the base are of no use to anyone who has it.
        let added = theirs.names().filter(|name| !name.ends_with(".base_layer.weight")).collect::<Vec<_>>();
        assert_eq!(ours.names().collect::<Vec<_>>(), added, "{}", case.display());
        assert_eq!(ours.metadata(), theirs.metadata());
        for name in ours.names() {
            let [a, b] = [&ours, &theirs].map(|r| r.tensor(name, Device::Cpu).unwrap());
            assert!(a.equal(&b), "{name}");
        }
        let [ours, theirs] =
            [&copy, &case.join("adapter")].map(|f| LoraConfig::from_peft_file(&f.join(CONFIG_FILE)).unwrap());
        let [ours, theirs] = [ours, theirs].map(|c| c.to_peft_text(false));
        assert_eq!(ours, theirs);
        assert!(copy.join("README.md").exists());
        let left: Vec<_> = std::fs::read_dir(folder.path().join("new")).unwrap().collect();
        assert_eq!(left.len(), 1, "a temporary folder was left behind");
    }
}

#[test]
fn all_linear_beside_chosen_layers_is_saved_as_names_which_is_all_that_peft_takes_there() {
    let model = tiny("llama");
    let config = LoraConfig { layers_to_transform: vec![1], ..Default::default() };
    let adapter = LoraAdapter::new(config, &model, 1).unwrap();
    let paths = |adapter: &LoraAdapter| adapter.targets().map(|(path, _)| path.to_string()).collect::<Vec<_>>();
    assert!(adapter.targets().all(|(path, _)| path.starts_with("model.layers.1.")), "{:?}", paths(&adapter));
    assert_eq!(adapter.targets().count(), 7);
    let folder = tempfile::tempdir().unwrap();
    adapter.save(folder.path()).unwrap();
    let config = std::fs::read(folder.path().join(CONFIG_FILE)).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    let names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"];
    assert_eq!(config["target_modules"], serde_json::json!(names));
    assert_eq!(config["layers_to_transform"], serde_json::json!([1]));
    assert_eq!(paths(&LoraAdapter::load(folder.path(), &model).unwrap()), paths(&adapter));
}

#[test]
fn missing_and_unexpected_tensors_are_listed() {
    let error = load_changed(|tensors| tensors[0].0 += ".typo");
    let PeftError::Keys { missing, unexpected, .. } = &error else { panic!("{error}") };
    assert_eq!((missing.len(), unexpected.len()), (1, 1), "{error}");
    assert!(error.to_string().contains("q_proj.lora_A.weight"), "{error}");
}

#[test]
fn transposed_tensors_get_the_hint() {
    let error = load_changed(|tensors| tensors[0].1 = tensors[0].1.tr().contiguous());
    assert!(error.to_string().contains("has shape [32, 4], expected [4, 32]"), "{error}");
    assert!(error.hint().unwrap().contains("transposed"));
}

#[test]
fn a_rank_that_the_tensors_do_not_have_is_refused_before_memory_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    changed(folder.path(), |_| {});
    let path = folder.path().join(CONFIG_FILE);
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["r"] = 1_000_000_000_000_i64.into();
    std::fs::write(&path, config.to_string()).unwrap();
    let error = LoraAdapter::load(folder.path(), &tiny("llama")).unwrap_err();
    assert!(error.to_string().contains("has shape [4, 32], expected [1000000000000, 32]"), "{error}");
    assert!(error.hint().unwrap().contains("`r`"), "{error:?}");
    // Settings of one's own have no file to compare with: what libtorch says is an error and no panic.
    let config = LoraConfig { rank: 1_000_000_000_000, ..Default::default() };
    assert!(matches!(LoraAdapter::new(config, &tiny("llama"), 1), Err(PeftError::Tensor(_))));
}

#[test]
fn a_leftover_of_a_killed_process_is_in_nobodys_way() {
    let folder = tempfile::tempdir().unwrap();
    // As an earlier release named it, by a process id that comes again in the next container.
    std::fs::create_dir(folder.path().join(format!(".partial-a-{}", std::process::id()))).unwrap();
    let adapter = LoraAdapter::new(LoraConfig::default(), &tiny("llama"), 1).unwrap();
    adapter.save(&folder.path().join("a")).unwrap();
    assert!(folder.path().join("a").join(TENSOR_FILE).exists());
}

#[test]
fn a_cut_file_is_an_error_at_every_length() {
    let folder = tempfile::tempdir().unwrap();
    changed(folder.path(), |_| {});
    let whole = std::fs::read(folder.path().join(TENSOR_FILE)).unwrap();
    let model = tiny("llama");
    for len in (0..whole.len()).step_by(61) {
        std::fs::write(folder.path().join(TENSOR_FILE), &whole[..len]).unwrap();
        assert!(LoraAdapter::load(folder.path(), &model).is_err(), "a prefix of {len} bytes was read");
    }
}

#[test]
fn pickles_are_refused_with_the_way_to_convert_them() {
    let folder = tempfile::tempdir().unwrap();
    changed(folder.path(), |_| {});
    std::fs::rename(folder.path().join(TENSOR_FILE), folder.path().join("adapter_model.bin")).unwrap();
    let error = LoraAdapter::load(folder.path(), &tiny("llama")).unwrap_err();
    assert!(error.to_string().contains("pickle") && error.hint().unwrap().contains("save_file"), "{error}");
}

#[test]
fn a_folder_that_is_no_adapter_says_so() {
    let model = tiny("llama");
    let error = LoraAdapter::load(&fixtures().join("models/llama/model"), &model).unwrap_err();
    assert!(error.hint().unwrap().contains("this is a model"), "{error}");
    assert!(LoraAdapter::load(Path::new("no/such/folder"), &model).unwrap_err().to_string().contains("no such folder"));
}

#[test]
fn an_adapter_of_another_architecture_lists_what_the_model_has() {
    let error = LoraAdapter::load(&fixtures().join("lora/gpt2_conv1d/adapter"), &tiny("llama")).unwrap_err();
    assert_eq!(error.to_string(), "`target_modules`: nothing matches `c_attn` in this model");
    assert!(error.hint().unwrap().contains("`q_proj`"), "{error:?}");
    let error = load_adapter(&fixtures().join("lora/gpt2_conv1d/adapter"), &tiny("llama")).unwrap_err();
    let text = error.to_string();
    assert!(text.ends_with("/adapter_config.json: `target_modules`: nothing matches `c_attn` in this model"), "{text}");
    assert!(error.hint().unwrap().contains("`q_proj`"), "{error:?}");
}

#[test]
fn a_fault_of_settings_in_a_file_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let text = r#"{"peft_type": "LORA", "r": 0, "target_modules": ["q_proj"]}"#;
    std::fs::write(folder.path().join(CONFIG_FILE), text).unwrap();
    let error = MethodConfig::from_folder(folder.path()).unwrap_err().to_string();
    let expected =
        format!("{}: a fault in the adapter's settings: `rank` is 0", folder.path().join(CONFIG_FILE).display());
    assert!(error.starts_with(&expected), "{error}");
}

#[test]
fn saving_into_an_existing_folder_keeps_a_readme() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("README.md"), "mine").unwrap();
    let model = tiny("llama");
    LoraAdapter::new(LoraConfig::default(), &model, 1).unwrap().save(folder.path()).unwrap();
    assert_eq!(std::fs::read_to_string(folder.path().join("README.md")).unwrap(), "mine");
    LoraAdapter::load(folder.path(), &model).unwrap();
}

#[test]
fn a_folder_that_cannot_be_written_is_named_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let blocked = folder.path().join("file");
    std::fs::write(&blocked, "").unwrap();
    let error =
        LoraAdapter::new(LoraConfig::default(), &tiny("llama"), 1).unwrap().save(&blocked.join("a")).unwrap_err();
    assert!(error.to_string().contains("cannot write"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}
