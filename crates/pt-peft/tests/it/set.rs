//! Several adapters over one model.

use crate::laws::{names, rank4, two_sequences};
use crate::tiny;
use pt_model::{Bare, CausalLm, Completion, GenerateConfig, PackedBatch, PromptGroup, RunOptions, Sites, generate};
use pt_peft::testing::{disturb, logits};
use pt_peft::{
    Adapter, AdapterSet, BitfitAdapter, BitfitConfig, LoraAdapter, LoraConfig, PeftError, PromptTuningAdapter,
    PromptTuningConfig, TinytlAdapter, TinytlConfig, TinytlMode,
};
use pt_tensor::{Device, LabelLogprobs, Tensor};
use std::rc::Rc;

fn lora(model: &CausalLm, config: LoraConfig, seed: u64) -> Rc<LoraAdapter> {
    let adapter = Rc::new(LoraAdapter::new(config, model, seed).unwrap());
    disturb(adapter.as_ref(), 0.05);
    adapter
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
    let set = AdapterSet::new();
    let last = "layers.1.mlp.down_proj";
    let first = make(1, &[last]);
    set.insert("first", first.clone()).unwrap();
    set.insert("second", make(2, &[last])).unwrap();
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
    let set = AdapterSet::new();
    for name in ["a", "b"] {
        set.insert(name, Rc::new(LoraAdapter::new(config.clone(), &model, 1).unwrap())).unwrap();
    }
    assert!(matches!(set.set_active(&["a", "b"]), Err(PeftError::State(_))));
}

#[test]
fn biases_of_norms_are_replaced_by_one_adapter_only_and_those_of_layers_add_up() {
    let model = tiny("gpt2");
    let bitfit = |config| -> Rc<dyn Adapter> { Rc::new(BitfitAdapter::new(config, &model).unwrap()) };
    let tinytl = |mode| -> Rc<dyn Adapter> {
        Rc::new(TinytlAdapter::new(TinytlConfig { mode, ..TinytlConfig::default() }, &model, 1).unwrap())
    };
    let set = AdapterSet::new();
    set.insert("bitfit", bitfit(BitfitConfig::default())).unwrap();
    set.insert("tinytl", tinytl(TinytlMode::Both)).unwrap();
    let error = set.set_active(&["bitfit", "tinytl"]).unwrap_err().to_string();
    assert!(error.starts_with("`bitfit` and `tinytl` both replace `transformer."), "{error}");
    set.insert("tinytl", tinytl(TinytlMode::LiteResidual)).unwrap();
    set.set_active(&["bitfit", "tinytl"]).unwrap();
    let layers = BitfitConfig { target_modules: Some(names(&["c_fc"])), ..BitfitConfig::default() };
    set.insert("layers", bitfit(layers)).unwrap();
    set.set_active(&["bitfit", "layers"]).unwrap();
}

#[test]
fn virtual_tokens_of_a_routed_batch_are_those_of_its_routes() {
    let model = tiny("llama");
    let config = PromptTuningConfig { num_virtual_tokens: 5, ..PromptTuningConfig::default() };
    let set = AdapterSet::new();
    set.insert("prompt", Rc::new(PromptTuningAdapter::new(config, &model, None, 1).unwrap())).unwrap();
    set.insert("lora", lora(&model, rank4(), 1)).unwrap();
    assert_eq!(set.num_virtual_tokens(), 5, "the first is active");
    for (routes, count) in [([Some("lora"), None], 0), ([Some("prompt"), Some("prompt")], 5)] {
        set.set_routes(&routes).unwrap();
        assert_eq!(set.num_virtual_tokens(), count);
    }
    // A prompt that leaves no room for tokens that it does not get is completed.
    let context = model.config().max_position_embeddings;
    let prompt: Vec<i64> = (0..context - 2).map(|i| i % 100).collect();
    let set = Rc::new(set);
    let sites: Rc<dyn Sites> = set.clone();
    let run = || {
        let config = GenerateConfig { max_new_tokens: 1, ..Default::default() };
        generate(&model, None, std::slice::from_ref(&prompt), &config, &sites, |_, _| true)
    };
    assert!(run().is_err());
    set.set_routes(&[None]).unwrap();
    assert_eq!(run().unwrap()[0].token_ids.len(), 1);
}

#[test]
fn an_adapter_is_exchanged_between_two_requests_of_a_generation_loop() {
    let model = tiny("llama");
    let set = Rc::new(AdapterSet::new());
    let sites: Rc<dyn Sites> = set.clone();
    let answer = |sites: &Rc<dyn Sites>| {
        let config = GenerateConfig { max_new_tokens: 6, with_logprobs: true, ..Default::default() };
        let mut out = generate(&model, None, &[vec![5, 9, 14]], &config, sites, |_, _| true).unwrap();
        let first = out.swap_remove(0);
        (first.token_ids, first.logprobs.unwrap())
    };
    let bare: Rc<dyn Sites> = Rc::new(Bare);
    let mut answers = Vec::new();
    for seed in [1, 2] {
        let adapter = lora(&model, rank4(), seed);
        set.insert("a", adapter.clone()).unwrap();
        let alone: Rc<dyn Sites> = adapter;
        answers.push(answer(&sites));
        assert_eq!(answers.last(), Some(&answer(&alone)));
    }
    assert_ne!(answers[0], answers[1]);
    set.remove("a").unwrap();
    assert_eq!(answer(&sites), answer(&bare));
}

#[test]
fn exchanging_an_active_adapter_is_checked_as_activating_it_is() {
    let model = tiny("llama_untied");
    let make = |modules_to_save: &[&str]| {
        let modules_to_save = modules_to_save.iter().map(ToString::to_string).collect();
        Rc::new(LoraAdapter::new(LoraConfig { modules_to_save, ..rank4() }, &model, 1).unwrap())
    };
    let set = AdapterSet::new();
    set.insert("a", make(&["lm_head"])).unwrap();
    set.insert("b", make(&[])).unwrap();
    set.set_active(&["a", "b"]).unwrap();
    assert!(matches!(set.insert("b", make(&["lm_head"])), Err(PeftError::State(_))));
    assert!(set.get("b").unwrap().replaced_parameters().is_empty(), "the old one stays");
    set.insert("a", make(&[])).unwrap();
    set.insert("b", make(&["lm_head"])).unwrap();
}

/// Adapters of several ranks and places, and prompts that go to them or to none.
fn routed_set(model: &CausalLm) -> (Rc<AdapterSet>, Vec<Option<&'static str>>, Vec<Vec<i64>>) {
    let set = AdapterSet::new();
    set.insert("a", lora(model, rank4(), 1)).unwrap();
    set.insert("b", lora(model, LoraConfig { rank: 2, target_modules: names(&["v_proj", "up_proj"]), ..rank4() }, 2))
        .unwrap();
    let prompts = vec![vec![5, 9, 14], vec![11], (1..10).collect(), vec![7, 7, 2, 40]];
    (Rc::new(set), vec![Some("b"), None, Some("a"), Some("b")], prompts)
}

#[test]
fn each_prompt_of_a_batch_scores_with_its_own_adapter() {
    let model = tiny("llama");
    let (set, routes, prompts) = routed_set(&model);
    let groups: Vec<PromptGroup> =
        prompts.iter().map(|ids| PromptGroup::single(ids.clone(), Completion::new(vec![3, 8, 21]))).collect();
    let score = |groups: &[PromptGroup], sites: Rc<dyn Sites>| {
        let batch = PackedBatch::new(groups, Device::Cpu).unwrap();
        model.label_logprobs(&batch, &sites, RunOptions::default(), &LabelLogprobs::default()).unwrap().logprobs
    };
    set.set_routes(&routes).unwrap();
    let together = score(&groups, set.clone());
    set.clear_routes();
    let alone: Vec<Tensor> = groups
        .iter()
        .zip(&routes)
        .map(|(group, route)| {
            set.set_active(route.as_slice()).unwrap();
            score(std::slice::from_ref(group), set.clone())
        })
        .collect();
    let off = (together - Tensor::cat(&alone, 0)).abs().max().double_value(&[]);
    assert!(off < 1e-5, "off by {off:e}");
}

#[test]
fn each_prompt_of_a_batch_is_completed_with_its_own_adapter() {
    let model = tiny("llama");
    let (set, routes, prompts) = routed_set(&model);
    let config = GenerateConfig {
        max_new_tokens: 8,
        num_samples: 2,
        temperature: 1.0,
        with_logprobs: true,
        ..Default::default()
    };
    let run = |prompts: &[Vec<i64>], first_prompt: u64| {
        let config = GenerateConfig { first_prompt, ..config.clone() };
        let sites: Rc<dyn Sites> = set.clone();
        generate(&model, None, prompts, &config, &sites, |_, _| true).unwrap()
    };
    set.set_routes(&routes).unwrap();
    let together = run(&prompts, 0);
    set.clear_routes();
    for (p, (prompt, route)) in prompts.iter().zip(&routes).enumerate() {
        set.set_active(route.as_slice()).unwrap();
        let alone = run(std::slice::from_ref(prompt), p as u64);
        for (a, b) in alone.iter().zip(&together[2 * p..]) {
            assert_eq!(a.token_ids, b.token_ids, "prompt {p}");
        }
    }
}

#[test]
fn adapters_come_and_go_while_the_set_is_in_use() {
    let model = tiny("llama");
    let (set, ..) = routed_set(&model);
    let sites: Rc<dyn Sites> = set.clone();
    let run = || logits(&model, &sites, &two_sequences()).unwrap();
    let first = run();
    let replaced = lora(&model, rank4(), 9);
    set.insert("a", replaced.clone()).unwrap();
    let alone: Rc<dyn Sites> = replaced;
    assert!(run().equal(&logits(&model, &alone, &two_sequences()).unwrap()) && !run().equal(&first));
    set.remove("a").unwrap();
    let bare: Rc<dyn Sites> = Rc::new(Bare);
    assert!(run().equal(&logits(&model, &bare, &two_sequences()).unwrap()));
    assert!(matches!(set.remove("a"), Err(PeftError::UnknownAdapter { .. })));
}

#[test]
fn what_prompts_of_a_batch_share_cannot_be_routed() {
    let model = tiny("llama_untied");
    let set = AdapterSet::new();
    let whole = |module: &str| LoraConfig { modules_to_save: vec![module.into()], ..rank4() };
    set.insert("norm", lora(&model, whole("model.norm"), 1)).unwrap();
    set.insert("head", lora(&model, whole("lm_head"), 1)).unwrap();
    let groups: Vec<PromptGroup> =
        two_sequences().into_iter().map(|ids| PromptGroup::single(ids, Completion::new(vec![3]))).collect();
    let batch = PackedBatch::new(&groups, Device::Cpu).unwrap();
    let set = Rc::new(set);
    for name in ["norm", "head"] {
        set.set_routes(&[Some(name), None]).unwrap();
        let sites: Rc<dyn Sites> = set.clone();
        let error = model.label_logprobs(&batch, &sites, RunOptions::default(), &LabelLogprobs::default()).unwrap_err();
        assert!(error.to_string().contains(&format!("`{name}` replaces")), "{error}");
        // All prompts to one adapter is no routing.
        set.set_routes(&[Some(name), Some(name)]).unwrap();
        let run = model.label_logprobs(&batch, &sites, RunOptions::default(), &LabelLogprobs::default());
        assert_eq!(run.unwrap().logprobs.size(), [2]);
    }
    assert!(matches!(set.set_routes(&[Some("none")]), Err(PeftError::UnknownAdapter { .. })));
    set.set_routes(&[None]).unwrap();
    let sites: Rc<dyn Sites> = set.clone();
    let error = model.label_logprobs(&batch, &sites, RunOptions::default(), &LabelLogprobs::default()).unwrap_err();
    assert!(error.to_string().contains("routes were set for 1"), "{error}");
}
