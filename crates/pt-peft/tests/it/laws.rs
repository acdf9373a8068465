//! The laws of adapters, and several of them over one model.

use crate::{bf16, nf4, tiny};
use pt_model::{Linear, Sites};
use pt_peft::testing::{Subject, adapter_laws, disturb, logits, trains_over};
use pt_peft::{
    Adapter, AdapterSet, BiasMode, BitfitAdapter, BitfitConfig, BottleneckAdapter, BottleneckConfig, Ia3Adapter,
    Ia3Config, LoraAdapter, LoraConfig, LoraInit, Modules, PeftError, Preset, Scaling, TinytlAdapter, TinytlConfig,
    TinytlMode, TokenIndices, TrainedScaling, load_adapter,
};
use pt_tensor::{Device, Kind, Tensor, no_grad};
use std::rc::Rc;

pub(crate) fn names(names: &[&str]) -> Modules {
    Modules::Names(names.iter().map(ToString::to_string).collect())
}

pub(crate) fn two_sequences() -> Vec<Vec<i64>> {
    vec![(1..9).collect(), vec![40, 3, 77]]
}

fn check(model: &str, config: LoraConfig) {
    check_from(model, config, true);
}

fn check_from(model: &str, config: LoraConfig, starts_neutral: bool) {
    let folder = tempfile::tempdir().unwrap();
    let subject = Subject {
        new: &|model| Ok(Rc::new(LoraAdapter::new(config.clone(), model, 3)?)),
        load: &load_adapter,
        tolerance: 2e-5,
        starts_neutral,
        is_mergeable: true,
    };
    adapter_laws(&subject, &mut tiny(model), &two_sequences(), folder.path()).unwrap();
    for base in [bf16(model), nf4(model)] {
        trains_over(&subject, &base, &two_sequences(), folder.path()).unwrap();
    }
}

/// The laws for a method that goes into weights and starts as the bare model.
fn check_method(model: &str, new: &dyn Fn(&pt_model::CausalLm) -> pt_peft::testing::Made) {
    let folder = tempfile::tempdir().unwrap();
    let subject = Subject { new, load: &load_adapter, tolerance: 2e-5, starts_neutral: true, is_mergeable: true };
    adapter_laws(&subject, &mut tiny(model), &two_sequences(), folder.path()).unwrap();
    for base in [bf16(model), nf4(model)] {
        trains_over(&subject, &base, &two_sequences(), folder.path()).unwrap();
    }
}

#[test]
fn ia3_keeps_the_laws_where_peft_puts_it_and_elsewhere() {
    let check = |model: &str, config: Ia3Config| {
        check_method(model, &|model| Ok(Rc::new(Ia3Adapter::new(config.clone(), model)?)));
    };
    for model in ["llama", "mistral", "qwen2", "gpt2"] {
        check(model, Ia3Config::default());
    }
    let all = Some(Modules::Pattern("all-linear".into()));
    check(
        "llama_untied",
        Ia3Config { target_modules: all, modules_to_save: vec!["lm_head".into()], ..Default::default() },
    );
    // Targets alone: the feed-forward layers are those of the architecture that are among them.
    for (targets, is_input) in [(&["q_proj"][..], false), (&["down_proj"], true)] {
        let config = Ia3Config { target_modules: Some(names(targets)), ..Default::default() };
        let adapter = Ia3Adapter::new(config, &tiny("llama")).unwrap();
        assert!(adapter.targets().count() > 0 && adapter.targets().all(|(_, of_input)| of_input == is_input));
    }
    let output = Some(names(&["q_proj", "lm_head"]));
    for feedforward in [&[][..], &["lm_head"]] {
        let feedforward_modules = Some(names(feedforward));
        check("llama", Ia3Config { target_modules: output.clone(), feedforward_modules, ..Default::default() });
    }
}

#[test]
fn bitfit_keeps_the_laws_with_the_models_biases_and_with_new_ones() {
    let check = |model: &str, config: BitfitConfig| {
        check_method(model, &|model| Ok(Rc::new(BitfitAdapter::new(config.clone(), model)?)));
    };
    for model in ["llama", "llama_untied", "mistral", "qwen2", "gpt2"] {
        check(model, BitfitConfig::default());
    }
    let chosen = |target_modules| BitfitConfig { target_modules: Some(target_modules), ..Default::default() };
    check("gpt2", chosen(names(&["ln_1", "mlp.c_fc"])));
    check("qwen2", chosen(Modules::Pattern("all-linear".into())));
    check("llama", chosen(Modules::Pattern(r".*\.(q_proj|down_proj)".into())));
}

#[test]
fn bottleneck_adapters_keep_the_laws_in_each_form() {
    let check = |model: &str, config: BottleneckConfig| {
        let folder = tempfile::tempdir().unwrap();
        let starts_neutral = config.preset == Preset::ParBn;
        let subject = Subject {
            new: &|model| Ok(Rc::new(BottleneckAdapter::new(config.clone(), model, 3)?)),
            load: &load_adapter,
            tolerance: 2e-5,
            starts_neutral,
            is_mergeable: false,
        };
        adapter_laws(&subject, &mut tiny(model), &two_sequences(), folder.path()).unwrap();
        for base in [bf16(model), nf4(model)] {
            trains_over(&subject, &base, &two_sequences(), folder.path()).unwrap();
        }
    };
    for preset in [Preset::SeqBn, Preset::DoubleSeqBn, Preset::ParBn] {
        for model in ["llama", "gpt2"] {
            check(model, BottleneckConfig { preset, ..Default::default() });
        }
    }
    let with_norms = BottleneckConfig {
        preset: Preset::DoubleSeqBn,
        ln_before: Some(true),
        ln_after: Some(true),
        scaling: Some(Scaling::Trained(TrainedScaling::Channel)),
        ..Default::default()
    };
    check("mistral", with_norms.clone());
    check("qwen2", BottleneckConfig { is_parallel: Some(true), leave_out: vec![0], ..with_norms });
}

#[test]
fn tinytl_keeps_the_laws_in_each_mode() {
    let check = |model: &str, config: TinytlConfig| {
        let folder = tempfile::tempdir().unwrap();
        let subject = Subject {
            new: &|model| Ok(Rc::new(TinytlAdapter::new(config.clone(), model, 3)?)),
            load: &load_adapter,
            tolerance: 2e-5,
            starts_neutral: true,
            is_mergeable: config.mode == TinytlMode::Bias,
        };
        adapter_laws(&subject, &mut tiny(model), &two_sequences(), folder.path()).unwrap();
        for base in [bf16(model), nf4(model)] {
            trains_over(&subject, &base, &two_sequences(), folder.path()).unwrap();
        }
    };
    for mode in [TinytlMode::Bias, TinytlMode::LiteResidual, TinytlMode::Both] {
        for model in ["llama", "gpt2", "qwen2"] {
            check(model, TinytlConfig { mode, ..Default::default() });
        }
    }
    // A reach that is shorter than the sequences, and one group.
    let short = TinytlConfig { kernel_size: 1, groups: 1, expand_ratio: 1.0, ..Default::default() };
    check("mistral", short.clone());
    check("llama_untied", TinytlConfig { kernel_size: 2, groups: 4, ..short });
}

pub(crate) fn rank4() -> LoraConfig {
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
    check("gpt2", LoraConfig { modules_to_save: vec!["ln_f".into(), "ln_1".into(), "wpe".into()], ..rank4() });
}

#[test]
fn lora_keeps_the_laws_on_the_output_layer_tied_or_not() {
    check("llama_untied", LoraConfig { target_modules: names(&["q_proj", "lm_head"]), ..rank4() });
    check("llama", LoraConfig { target_modules: names(&["lm_head"]), ..rank4() });
}

#[test]
fn dora_keeps_the_laws() {
    let dora = LoraConfig { use_dora: true, ..rank4() };
    check("llama", dora.clone());
    check("qwen2", LoraConfig { use_rslora: true, ..dora.clone() });
    check("gpt2", dora.clone());
    check("llama_untied", LoraConfig { target_modules: names(&["embed_tokens", "lm_head"]), ..dora.clone() });
    check("gpt2", LoraConfig { target_modules: names(&["wte", "c_fc"]), ..dora });
}

#[test]
fn lora_keeps_the_laws_on_the_embedding_tied_or_not() {
    check("llama_untied", LoraConfig { target_modules: names(&["embed_tokens", "lm_head"]), ..rank4() });
    check("llama", LoraConfig { target_modules: names(&["embed_tokens", "q_proj"]), ..rank4() });
    check("gpt2", LoraConfig { target_modules: names(&["wte"]), ..rank4() });
}

#[test]
fn lora_keeps_the_laws_with_biases() {
    let with = |bias| LoraConfig { bias, ..rank4() };
    check("gpt2", LoraConfig { target_modules: names(&["c_attn"]), ..with(BiasMode::All) });
    check("qwen2", with(BiasMode::LoraOnly));
    let dora = LoraConfig { use_dora: true, ..with(BiasMode::LoraOnly) };
    check("gpt2", LoraConfig { target_modules: names(&["c_attn"]), ..dora });
    check("qwen2", LoraConfig { target_modules: names(&["q_proj", "v_proj"]), lora_bias: true, ..with(BiasMode::All) });
    // Llama has no biases: there is nothing to add to the update.
    check("llama", with(BiasMode::All));
}

#[test]
fn trained_tokens_keep_the_laws_tied_or_not() {
    let config = LoraConfig {
        target_modules: names(&["q_proj"]),
        trainable_token_indices: Some(TokenIndices::Ids(vec![77, 2, 5])),
        ..rank4()
    };
    check("llama", config.clone());
    check("llama_untied", config.clone());
    check("gpt2", LoraConfig { target_modules: names(&["c_attn"]), ..config });
}

#[test]
fn starts_keep_the_laws() {
    for name in ["gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"] {
        let start = |config| LoraConfig { init_lora_weights: LoraInit::Named(name.into()), ..config };
        check("llama", start(LoraConfig { target_modules: names(&["q_proj", "down_proj"]), ..rank4() }));
        if name == "pissa" {
            check("llama_untied", start(LoraConfig { target_modules: names(&["embed_tokens", "lm_head"]), ..rank4() }));
            check("gpt2", start(LoraConfig { target_modules: names(&["c_attn"]), ..rank4() }));
        }
    }
    check_from("llama", LoraConfig { init_lora_weights: LoraInit::Default(false), ..rank4() }, false);
}

#[test]
fn tokens_that_are_trained_otherwise_or_do_not_exist_are_refused() {
    let new = |model: &str, targets: &[&str], ids: TokenIndices| {
        let config = LoraConfig { target_modules: names(targets), trainable_token_indices: Some(ids), ..rank4() };
        LoraAdapter::new(config, &tiny(model), 1).unwrap_err().to_string()
    };
    let one = || TokenIndices::Ids(vec![1]);
    let text = new("llama", &["embed_tokens"], one());
    assert!(text.contains("while `model.embed_tokens` is trained otherwise"), "{text}");
    let text = new("llama", &["lm_head"], one());
    assert!(text.contains("while `lm_head`, which is tied, is trained otherwise"), "{text}");
    let text = new("llama", &["q_proj"], TokenIndices::Ids(vec![128]));
    assert!(text.contains("has 128, expected ids below 128"), "{text}");
    let text = new("llama_untied", &["q_proj"], TokenIndices::ByModule([("lm_head".to_string(), vec![1])].into()));
    assert_eq!(text, "`trainable_token_indices`: nothing matches `lm_head` in this model");
}

#[test]
fn a_rank_that_a_weight_does_not_have_is_refused_where_its_parts_are_taken() {
    let init_lora_weights = LoraInit::Named("pissa".into());
    let config = LoraConfig { rank: 33, target_modules: names(&["q_proj"]), init_lora_weights, ..rank4() };
    let text = LoraAdapter::new(config, &tiny("llama"), 1).unwrap_err().to_string();
    assert!(text.contains("`rank` is 33, expected at most 32 at `model.layers.0.self_attn.q_proj`"), "{text}");
}

#[test]
fn lora_plus_trains_b_and_vectors_faster() {
    let model = tiny("qwen2");
    let config = LoraConfig {
        target_modules: names(&["q_proj", "embed_tokens"]),
        use_dora: true,
        bias: BiasMode::LoraOnly,
        loraplus_lr_ratio: Some(16.0),
        ..rank4()
    };
    let adapter = LoraAdapter::new(config, &model, 1).unwrap();
    for (name, tensor) in adapter.parameters() {
        let is_fast = name.contains("lora_B") || tensor.dim() == 1;
        assert_eq!(adapter.lr_factor(&name), if is_fast { 16.0 } else { 1.0 }, "{name}");
    }
    let slow = LoraAdapter::new(rank4(), &model, 1).unwrap();
    assert!(slow.parameters().iter().all(|(name, _)| slow.lr_factor(name) == 1.0));
}

#[test]
fn variants_on_one_layer_act_through_a_set_as_alone() {
    for config in [
        LoraConfig { use_dora: true, bias: BiasMode::All, ..rank4() },
        LoraConfig { init_lora_weights: LoraInit::Named("olora".into()), ..rank4() },
        LoraConfig { trainable_token_indices: Some(TokenIndices::Ids(vec![2])), lora_bias: true, ..rank4() },
    ] {
        let model = tiny("qwen2");
        let adapter = Rc::new(LoraAdapter::new(config, &model, 1).unwrap());
        disturb(adapter.as_ref(), 0.05);
        let first = LoraConfig { target_modules: names(&["q_proj", "down_proj"]), ..rank4() };
        let set = AdapterSet::new();
        // New, it is the bare model: the second one goes around nothing but the layer.
        set.insert("new", Rc::new(LoraAdapter::new(first, &model, 2).unwrap())).unwrap();
        set.insert("variant", adapter.clone()).unwrap();
        set.set_active(&["new", "variant"]).unwrap();
        let [alone, set]: [Rc<dyn Sites>; 2] = [adapter, Rc::new(set)];
        let [alone, set] = [alone, set].map(|sites| logits(&model, &sites, &two_sequences()).unwrap());
        let off = (alone - set).abs().max().double_value(&[]);
        assert!(off < 2e-5, "off by {off:e}");
    }
}

#[test]
fn dora_with_dropout_is_the_layer_where_nothing_is_dropped_or_scaled() {
    let model = tiny("gpt2");
    let config = LoraConfig { target_modules: names(&["c_fc"]), use_dora: true, lora_dropout: 0.5, ..rank4() };
    let adapter = LoraAdapter::new(config, &model, 1).unwrap();
    let layer = model.linear_layers().find(|layer| layer.path.ends_with("c_fc")).unwrap();
    let x = (Tensor::arange(3 * layer.weight.size().1, (Kind::Float, Device::Cpu)) * 0.7).sin().view([3, -1]);
    let _lock = GENERATOR.lock().unwrap();
    adapter.set_training(true);
    // New, m is the norm: what is dropped and what is kept go through one weight, and add up to the layer.
    let off = |a: Tensor, b: Tensor| (a - b).abs().max().double_value(&[]);
    assert!(off(adapter.linear(layer, &x).unwrap(), layer.forward(&x).unwrap()) < 1e-4);
    disturb(&adapter, 0.1);
    assert!(off(adapter.linear(layer, &x).unwrap(), adapter.linear(layer, &x).unwrap()) > 1e-3, "two draws");
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
fn in_bf16_a_trained_norm_and_factors_get_f32_gradients() {
    let model = bf16("llama");
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

fn on_output(model: &pt_model::CausalLm, lora_dropout: f64) -> Rc<LoraAdapter> {
    let config = LoraConfig { target_modules: names(&["lm_head"]), lora_dropout, ..rank4() };
    Rc::new(LoraAdapter::new(config, model, 1).unwrap())
}

#[test]
fn in_bf16_an_update_of_the_output_layer_is_not_rounded_away() {
    let model = bf16("llama_untied");
    let adapter = on_output(&model, 0.0);
    let layer = model.linear_layers().last().unwrap();
    let weight = layer.weight.dense().unwrap();
    // B so small that no entry of scaling·B·A reaches half a unit in the last place of the largest weights.
    for (name, tensor) in adapter.parameters().iter_mut() {
        if name.ends_with("lora_B.weight") {
            let _ = no_grad(|| tensor.fill_(1e-5));
        }
    }
    let hidden_states = (Tensor::arange(3 * weight.size()[1], (Kind::Float, Device::Cpu)) * 0.7).sin();
    let hidden_states = hidden_states.view([3, -1]).to_kind(Kind::BFloat16);
    let (states, weights) = adapter.output(layer, &hidden_states).unwrap();
    let single = |t: &Tensor| t.detach().to_kind(Kind::Float);
    let found = single(&states).matmul(&single(&weights).tr()) - single(&hidden_states).matmul(&single(&weight).tr());
    let [a, b] = [0, 1].map(|i| single(&adapter.parameters()[i].1));
    let want = single(&hidden_states).matmul(&a.tr()).matmul(&b.tr()) * 2.0; // lora_alpha / rank
    let error = |found: Tensor| (found - &want).abs().max().double_value(&[]) / want.abs().max().double_value(&[]);
    // What the test is about: a sum in bf16 loses most of such an update.
    let sum = (single(&weight) + b.matmul(&a) * 2.0).to_kind(Kind::BFloat16) - &weight;
    assert!(error(single(&hidden_states).matmul(&single(&sum).tr())) > 0.3);
    let error = error(found);
    assert!(error < 0.03, "off by {error:e} of the update");
}

#[test]
fn log_probs_with_an_update_on_the_output_layer_are_those_of_its_logits() {
    for name in ["llama", "llama_untied"] {
        let model = tiny(name);
        let adapter = on_output(&model, 0.0);
        disturb(adapter.as_ref(), 0.1);
        let set = AdapterSet::new();
        set.insert("one", adapter.clone()).unwrap();
        let ids = vec![1, 2, 3, 4, 5];
        let group = pt_model::PromptGroup::single(vec![], pt_model::Completion::new(ids.clone()));
        let batch = pt_model::PackedBatch::new(&[group], Device::Cpu).unwrap();
        for sites in [adapter.clone() as Rc<dyn Sites>, Rc::new(set)] {
            let out = model.label_logprobs(&batch, &sites, Default::default(), &Default::default()).unwrap();
            let log_p = logits(&model, &sites, std::slice::from_ref(&ids)).unwrap().log_softmax(-1, Kind::Float);
            let labels = Tensor::from_slice(&ids[1..]).unsqueeze(1);
            let want = log_p.narrow(0, 0, 4).gather(1, &labels, false).squeeze_dim(1);
            assert!((out.logprobs - want).abs().max().double_value(&[]) < 1e-5, "{name}");
        }
    }
}

/// Held by tests that draw dropout masks: the CPU generator is one for all threads.
static GENERATOR: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[test]
fn dropout_acts_on_the_update_of_the_output_layer() {
    let model = tiny("llama");
    let adapter = on_output(&model, 0.5);
    disturb(adapter.as_ref(), 0.1);
    let layer = model.linear_layers().last().unwrap();
    let hidden_states = Tensor::ones([2, layer.weight.size().1], (Kind::Float, Device::Cpu));
    let states = || adapter.output(layer, &hidden_states).unwrap().0;
    assert!(states().equal(&states()));
    let _lock = GENERATOR.lock().unwrap();
    adapter.set_training(true);
    assert!(!states().equal(&states()), "two draws of the mask");
}

#[test]
fn checkpointing_with_dropout_changes_no_gradient() {
    let model = tiny("llama");
    let config = LoraConfig { lora_dropout: 0.3, ..rank4() };
    let gradients = |is_checkpointed: bool| {
        let adapter = Rc::new(LoraAdapter::new(config.clone(), &model, 1).unwrap());
        disturb(adapter.as_ref(), 0.05);
        adapter.set_training(true);
        let sites: Rc<dyn Sites> = adapter.clone();
        let group = pt_model::PromptGroup::single(vec![1, 2], pt_model::Completion::new(vec![3, 4, 5]));
        let batch = pt_model::PackedBatch::new(&[group], Device::Cpu).unwrap();
        let _lock = GENERATOR.lock().unwrap();
        pt_tensor::random::seed(5);
        let run = pt_model::RunOptions { is_checkpointed };
        let out = model.label_logprobs(&batch, &sites, run, &Default::default()).unwrap();
        out.logprobs.sum(Kind::Float).backward();
        adapter.parameters().into_iter().map(|(name, tensor)| (name, tensor.grad())).collect::<Vec<_>>()
    };
    for ((name, plain), (_, checkpointed)) in gradients(false).into_iter().zip(gradients(true)) {
        assert!((plain - checkpointed).abs().max().double_value(&[]) < 1e-6, "{name}");
    }
}

#[test]
fn adapters_come_out_in_reverse_order_only() {
    for name in ["llama", "gpt2"] {
        let mut model = tiny(name);
        let make = |model: &pt_model::CausalLm, modules_to_save: Vec<String>| {
            let config = LoraConfig { modules_to_save, ..rank4() };
            let adapter = LoraAdapter::new(config, model, 1).unwrap();
            disturb(&adapter, 0.05);
            adapter
        };
        let embedding = if name == "gpt2" { "wte" } else { "embed_tokens" };
        for whole in [vec![], vec![embedding.to_string()]] {
            let [first, second] = [make(&model, whole.clone()), make(&model, whole)];
            let values = |model: &pt_model::CausalLm| {
                model.named_parameters().unwrap().into_iter().map(|(_, tensor)| tensor.copy()).collect::<Vec<_>>()
            };
            let bare = values(&model);
            first.merge_into(&mut model).unwrap();
            second.merge_into(&mut model).unwrap();
            let both = values(&model);
            let error = first.unmerge_from(&mut model).unwrap_err();
            assert!(matches!(&error, PeftError::State(why) if why.contains("merged after it first")), "{error}");
            assert!(values(&model).iter().zip(&both).all(|(a, b)| a.equal(b)), "a refused unmerge changes nothing");
            second.unmerge_from(&mut model).unwrap();
            first.unmerge_from(&mut model).unwrap();
            assert!(values(&model).iter().zip(&bare).all(|(a, b)| a.equal(b)));
        }
    }
}

#[test]
fn layers_of_a_model_of_ones_own_take_an_adapter() {
    let weight = |seed: f64| (Tensor::arange(20, (Kind::Float, Device::Cpu)) * seed).sin().view([5, 4]);
    let mut layers = [1.3, 0.7].map(|seed| {
        let index = usize::from(seed < 1.0);
        Linear::dense(index, format!("blocks.{index}.proj"), weight(seed), None).unwrap()
    });
    let config = LoraConfig { target_modules: names(&["proj"]), ..rank4() };
    let adapter = LoraAdapter::new(config, layers.as_slice(), 2).unwrap();
    disturb(&adapter, 0.1);
    let x = weight(2.1).narrow(0, 0, 3);
    let live = adapter.linear(&layers[1], &x).unwrap();
    assert!(!live.equal(&layers[1].forward(&x).unwrap()));
    let folder = tempfile::tempdir().unwrap();
    adapter.save(&folder.path().join("a")).unwrap();
    let loaded = LoraAdapter::load(&folder.path().join("a"), layers.as_slice()).unwrap();
    assert!(loaded.linear(&layers[1], &x).unwrap().equal(&live));
    adapter.merge_into_layers(&mut layers).unwrap();
    assert!((layers[1].forward(&x).unwrap() - live).abs().max().double_value(&[]) < 1e-5);
    adapter.unmerge_from_layers(&mut layers).unwrap();
    assert!(layers[1].weight.dense().unwrap().equal(&weight(0.7)));
}
