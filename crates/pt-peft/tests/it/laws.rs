//! The laws of adapters, and several of them over one model.

use crate::tiny;
use pt_model::{Bare, Sites};
use pt_peft::testing::{Method, adapter_laws, disturb, logits};
use pt_peft::{Adapter, AdapterSet, LoraAdapter, LoraConfig, Modules, PeftError};
use std::rc::Rc;

fn names(names: &[&str]) -> Modules {
    Modules::Names(names.iter().map(ToString::to_string).collect())
}

fn two_sequences() -> Vec<Vec<i64>> {
    vec![(1..9).collect(), vec![40, 3, 77]]
}

fn check(model: &str, config: LoraConfig) {
    let folder = tempfile::tempdir().unwrap();
    let method = Method {
        new: &|model| Ok(Rc::new(LoraAdapter::new(config.clone(), model, 3)?)),
        load: &|folder, model| Ok(Rc::new(LoraAdapter::load(folder, model)?)),
        tolerance: 2e-5,
    };
    adapter_laws(&method, &mut tiny(model), &two_sequences(), folder.path()).unwrap();
}

fn rank4() -> LoraConfig {
    LoraConfig { rank: 4, lora_alpha: 8.0, ..Default::default() }
}

#[test]
fn lora_keeps_the_laws_on_every_linear_layer() {
    check("llama", rank4());
    check("qwen2", LoraConfig { use_rslora: true, ..rank4() });
    check("gpt2", rank4());
}

#[test]
fn lora_keeps_the_laws_with_modules_to_save() {
    check("llama_untied", LoraConfig { modules_to_save: vec!["lm_head".into(), "embed_tokens".into()], ..rank4() });
    check("llama", LoraConfig { modules_to_save: vec!["embed_tokens".into(), "model.norm".into()], ..rank4() });
    check("gpt2", LoraConfig { target_modules: names(&["c_fc"]), modules_to_save: vec!["c_attn".into()], ..rank4() });
}

#[test]
fn lora_keeps_the_laws_on_the_output_layer_tied_or_not() {
    check("llama_untied", LoraConfig { target_modules: names(&["q_proj", "lm_head"]), ..rank4() });
    check("llama", LoraConfig { target_modules: names(&["lm_head"]), ..rank4() });
}

#[test]
fn active_adapters_add_up_and_a_disabled_set_is_the_bare_model() {
    let model = tiny("llama");
    let make = |seed, targets: &[&str]| {
        let config = LoraConfig { target_modules: names(targets), ..rank4() };
        let adapter = Rc::new(LoraAdapter::new(config, &model, seed).unwrap());
        disturb(adapter.as_ref(), 0.05);
        adapter
    };
    let mut set = AdapterSet::new();
    let last = "layers.1.mlp.down_proj";
    let first = make(1, &[last]);
    set.insert("first", first.clone());
    set.insert("second", make(2, &[last]));
    assert_eq!(set.active(), ["first"]);
    let set = Rc::new(set);
    let sites: Rc<dyn Sites> = set.clone();
    let run = || logits(&model, &sites, &two_sequences()).unwrap();
    let alone: Rc<dyn Sites> = first;
    assert!(run().equal(&logits(&model, &alone, &two_sequences()).unwrap()));
    set.set_active(&["first", "second"]).unwrap();
    let both = run();
    set.set_active(&["second", "first"]).unwrap();
    assert!((both - run()).abs().max().double_value(&[]) < 1e-5);
    set.set_enabled(false);
    let bare: Rc<dyn Sites> = Rc::new(Bare);
    assert!(run().equal(&logits(&model, &bare, &two_sequences()).unwrap()));
    let error = set.set_active(&["third"]).unwrap_err();
    assert_eq!(error.to_string(), "no adapter is called `third`; there are `first`, `second`");
}

#[test]
fn two_adapters_cannot_both_replace_a_parameter() {
    let model = tiny("llama_untied");
    let config = LoraConfig { modules_to_save: vec!["lm_head".into()], ..rank4() };
    let mut set = AdapterSet::new();
    for name in ["a", "b"] {
        set.insert(name, Rc::new(LoraAdapter::new(config.clone(), &model, 1).unwrap()));
    }
    assert!(matches!(set.set_active(&["a", "b"]), Err(PeftError::State(_))));
}

#[test]
fn the_number_of_trained_values_is_rank_times_both_widths() {
    let model = tiny("llama");
    let adapter = LoraAdapter::new(rank4(), &model, 1).unwrap();
    let widths: i64 = model
        .linear_layers()
        .filter(|layer| layer.path != "lm_head")
        .map(|layer| layer.weight.size().0 + layer.weight.size().1)
        .sum();
    assert_eq!(adapter.num_trainable() as i64, 4 * widths);
}

#[test]
fn a_parameter_that_the_model_does_not_ask_for_is_refused() {
    let config = LoraConfig { modules_to_save: vec!["ln_f".into()], ..rank4() };
    let error = LoraAdapter::new(config, &tiny("gpt2"), 1).unwrap_err().to_string();
    assert!(error.contains("`transformer.ln_f.bias`, which cannot be trained whole yet"), "{error}");
}

#[test]
fn in_bf16_a_trained_norm_and_factors_get_f32_gradients() {
    let pretrained = pt_model::Pretrained::open(crate::fixtures().join("models/llama/model")).unwrap();
    let model = pt_model::CausalLm::load(&pretrained, pt_tensor::Device::Cpu, pt_tensor::Kind::BFloat16).unwrap();
    let config = LoraConfig { modules_to_save: vec!["model.norm".into()], ..rank4() };
    let adapter = Rc::new(LoraAdapter::new(config, &model, 1).unwrap());
    disturb(adapter.as_ref(), 0.05);
    let sites: Rc<dyn Sites> = adapter.clone();
    let group = pt_model::PromptGroup::single(vec![1, 2], pt_model::Completion::new(vec![3, 4, 5]));
    let batch = pt_model::PackedBatch::new(&[group], pt_tensor::Device::Cpu).unwrap();
    let out = model.label_logprobs(&batch, &sites, Default::default(), &Default::default()).unwrap();
    out.logprobs.sum(pt_tensor::Kind::Float).backward();
    for (name, tensor) in adapter.parameters() {
        let grad = tensor.grad();
        assert!(grad.defined() && grad.kind() == pt_tensor::Kind::Float, "{name}");
        assert!(grad.abs().max().double_value(&[]) > 0.0, "{name} has a gradient of zero");
    }
}
