//! Adapter folders in AdapterHub's layout: what is written, and what is refused by name.

use crate::{fixtures, tiny};
use pt_model::Sites;
use pt_peft::testing::logits;
use pt_peft::{
    Adapter, BottleneckAdapter, BottleneckConfig, CONFIG_FILE, InitWeights, Method, MethodConfig, PeftError,
    ReductionFactor, load_adapter,
};
use pt_tensor::io::SafetensorsReader;
use std::rc::Rc;

const TENSORS: &str = "adapter.safetensors";

#[test]
fn settings_are_written_back_key_by_key() {
    for case in std::fs::read_dir(fixtures().join("bottleneck")).unwrap() {
        let case = case.unwrap().path();
        let base = crate::golden::setting(&case, "base");
        let copies = tempfile::tempdir().unwrap();
        let copy = copies.path().join("copy");
        BottleneckAdapter::load(&case.join("adapter"), &tiny(&base)).unwrap().save(&copy).unwrap();
        let read = |folder: &std::path::Path| -> serde_json::Value {
            serde_json::from_slice(&std::fs::read(folder.join(CONFIG_FILE)).unwrap()).unwrap()
        };
        assert_eq!(read(&copy), read(&case.join("adapter")), "{}", case.display());
        let card = std::fs::read_to_string(copy.join("README.md")).unwrap();
        assert!(card.contains("library_name: adapter-transformers") && card.contains("adapterhub"), "{card}");
    }
}

#[test]
fn a_norm_before_the_adapter_stands_in_the_file_under_both_its_names() {
    let model = tiny("llama");
    let config = BottleneckConfig { ln_before: Some(true), ..Default::default() };
    let adapter = BottleneckAdapter::new(config, &model, 1).unwrap();
    let folder = tempfile::tempdir().unwrap();
    adapter.save(&folder.path().join("a")).unwrap();
    let reader = SafetensorsReader::open(folder.path().join("a").join(TENSORS)).unwrap();
    let names: Vec<&str> = reader.names().filter(|name| name.contains("layers.0.")).collect();
    let place = "model.layers.0.output_adapters.adapters.default";
    let want = ["adapter_down.0.bias", "adapter_down.0.weight", "adapter_down.1.bias", "adapter_down.1.weight"]
        .into_iter()
        .chain(["adapter_norm_before.bias", "adapter_norm_before.weight", "adapter_up.bias", "adapter_up.weight"]);
    assert_eq!(names, want.map(|name| format!("{place}.{name}")).collect::<Vec<_>>());
    assert_eq!(adapter.parameters().len(), 2 * 6);
}

#[test]
fn each_start_is_the_papers() {
    let model = tiny("llama");
    let bare: Rc<dyn Sites> = Rc::new(pt_model::Bare);
    let ids = vec![(1..9).collect::<Vec<i64>>()];
    for (init, deviation) in [(InitWeights::Bert, 0.02), (InitWeights::Houlsby, 0.0088), (InitWeights::MamAdapter, 0.0)]
    {
        let factor = Some(ReductionFactor::Number(0.25));
        let config = BottleneckConfig { init_weights: Some(init), reduction_factor: factor, ..Default::default() };
        let adapter = Rc::new(BottleneckAdapter::new(config, &model, 1).unwrap());
        let up = adapter.parameters().into_iter().find(|(name, _)| name.ends_with("adapter_up.weight")).unwrap().1;
        let found = up.square().mean(pt_tensor::Kind::Float).sqrt().double_value(&[]);
        assert!((found - deviation).abs() <= 0.05 * deviation, "{init:?}: {found}");
        let down = &adapter.parameters()[0].1;
        assert!(down.size() == [128, 32] && down.abs().max().double_value(&[]) > 0.0);
        if init == InitWeights::MamAdapter {
            // The network gives zero; what is left of Pfeiffer's form is the branch itself.
            let sites: Rc<dyn Sites> = adapter;
            let [with, without] = [&sites, &bare].map(|sites| logits(&model, sites, &ids).unwrap());
            assert!((with - without).abs().max().double_value(&[]) < 1e-5);
        }
    }
}

#[test]
fn the_folder_is_told_from_pefts_and_its_pickle_is_refused() {
    let case = fixtures().join("bottleneck/par_bn/adapter");
    let config = MethodConfig::from_folder(&case).unwrap();
    assert_eq!((config.method(), config.tensor_file()), (Method::Bottleneck, TENSORS));
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(case.join(CONFIG_FILE), folder.path().join(CONFIG_FILE)).unwrap();
    std::fs::copy(case.join(TENSORS), folder.path().join("pytorch_adapter.bin")).unwrap();
    let error = load_adapter(folder.path(), &tiny("llama")).unwrap_err();
    assert!(error.to_string().contains("pytorch_adapter.bin, a pickle") && error.hint().unwrap().contains(TENSORS));
    // A width that the tensors do not have is refused before memory is taken.
    let text = std::fs::read_to_string(case.join(CONFIG_FILE)).unwrap();
    let text = text.replace("\"reduction_factor\": 2,", "\"reduction_factor\": 9.313225746154785e-10,");
    std::fs::write(folder.path().join(CONFIG_FILE), text).unwrap();
    std::fs::copy(case.join(TENSORS), folder.path().join(TENSORS)).unwrap();
    let error = load_adapter(folder.path(), &tiny("llama")).unwrap_err();
    assert!(error.to_string().contains("expected [34359738368, 32]"), "{error}");
    // On a model of other names.
    let error = load_adapter(&case, &tiny("gpt2")).unwrap_err();
    assert!(matches!(error, PeftError::Keys { .. }), "{error}");
}

#[test]
fn layers_that_are_not_there_are_named() {
    let config = BottleneckConfig { leave_out: vec![7], ..Default::default() };
    let text = BottleneckAdapter::new(config, &tiny("llama"), 1).unwrap_err().to_string();
    assert!(text.contains("`leave_out` has 7"), "{text}");
    let factor = Some(ReductionFactor::PerLayer([("0".to_string(), 4.0)].into()));
    let config = BottleneckConfig { reduction_factor: factor, ..Default::default() };
    let text = BottleneckAdapter::new(config, &tiny("llama"), 1).unwrap_err().to_string();
    assert!(text.contains("neither 1 nor `default`"), "{text}");
}
