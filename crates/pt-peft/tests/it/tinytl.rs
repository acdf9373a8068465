//! TinyTL: where it looks, and the memory that it is for.

use crate::laws::{names, two_sequences};
use crate::tiny;
use pt_model::{
    Bare, CausalLm, Completion, GenerateConfig, ModelConfig, PackedBatch, PromptGroup, RunOptions, Sites, TensorSource,
    generate,
};
use pt_peft::testing::{disturb, logits};
use pt_peft::{
    Adapter, AdapterSet, BitfitAdapter, BitfitConfig, LoraAdapter, LoraConfig, Modules, PeftError, TinytlAdapter,
    TinytlConfig, TinytlMode, load_adapter,
};
use pt_tensor::{Device, Kind, LabelLogprobs, Nf4Options, Nf4Weight, Tensor, peak_tensor_bytes};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

fn disturbed(model: &CausalLm, config: TinytlConfig) -> Rc<TinytlAdapter> {
    let adapter = Rc::new(TinytlAdapter::new(config, model, 1).unwrap());
    disturb(adapter.as_ref(), 0.1);
    adapter
}

#[test]
fn later_tokens_change_nothing_before_them() {
    let model = tiny("llama");
    let sites: Rc<dyn Sites> = disturbed(&model, TinytlConfig::default());
    let ids: Vec<i64> = (3..16).collect();
    let whole = logits(&model, &sites, std::slice::from_ref(&ids)).unwrap();
    for len in 1..ids.len() {
        let part = logits(&model, &sites, &[ids[..len].to_vec()]).unwrap();
        let off = (part - whole.narrow(0, 0, len as i64)).abs().max().double_value(&[]);
        assert!(off < 1e-5, "the first {len} tokens are off by {off:e}");
    }
    // The branch is not there for nothing.
    let bare: Rc<dyn Sites> = Rc::new(Bare);
    let moved = (logits(&model, &bare, &[ids]).unwrap() - whole).abs().max().double_value(&[]);
    assert!(moved > 0.01, "{moved}");
}

#[test]
fn samples_of_a_prompt_that_end_at_different_times_decode_as_alone() {
    let model = tiny("llama");
    let sites: Rc<dyn Sites> = disturbed(&model, TinytlConfig { kernel_size: 2, ..Default::default() });
    let prompts = [vec![5, 9, 2], (20..31).collect(), vec![7]];
    let run = |prompts: &[Vec<i64>], seed| {
        let config = GenerateConfig {
            max_new_tokens: 9,
            num_samples: 2,
            temperature: 1.0,
            seed,
            stop_ids: (0..40).collect(),
            with_logprobs: true,
            ..Default::default()
        };
        generate(&model, None, prompts, &config, &sites, |_, _| true).unwrap()
    };
    for (index, row) in run(&prompts, 4).iter().enumerate() {
        let prompt = &prompts[index / 2];
        let group = PromptGroup::single(prompt.clone(), Completion::new(row.token_ids.clone()));
        let batch = PackedBatch::new(&[group], Device::Cpu).unwrap();
        let whole = model.label_logprobs(&batch, &sites, RunOptions::default(), &LabelLogprobs::default()).unwrap();
        let found = Tensor::from_slice(row.logprobs.as_ref().unwrap());
        let off = (found - whole.logprobs).abs().max().double_value(&[]);
        assert!(off < 1e-5, "row {index} is off by {off:e}");
    }
}

#[test]
fn beside_other_methods_in_a_batch_each_prompt_gets_its_own() {
    let model = tiny("llama");
    let set = Rc::new(AdapterSet::new());
    let tinytl = |kernel_size| {
        let config = TinytlConfig { mode: TinytlMode::LiteResidual, kernel_size, ..Default::default() };
        disturbed(&model, config)
    };
    let lora = Rc::new(LoraAdapter::new(LoraConfig::default(), &model, 1).unwrap());
    disturb(lora.as_ref(), 0.05);
    let adapters: [(&str, Rc<dyn Adapter>); 3] = [("wide", tinytl(5)), ("narrow", tinytl(1)), ("lora", lora)];
    for (name, adapter) in &adapters {
        set.insert(*name, adapter.clone()).unwrap();
    }
    let prompts = [vec![5, 9, 2, 8], (20..31).collect(), vec![7], vec![3, 4, 5], vec![9, 9, 9]];
    let routes = [Some("wide"), Some("lora"), Some("narrow"), None, Some("wide")];
    set.set_routes(&routes).unwrap();
    let run = |prompts: &[Vec<i64>], sites: &Rc<dyn Sites>| {
        let config = GenerateConfig { max_new_tokens: 6, with_logprobs: true, ..Default::default() };
        generate(&model, None, prompts, &config, sites, |_, _| true).unwrap()
    };
    let together = run(&prompts, &(set.clone() as Rc<dyn Sites>));
    for ((prompt, route), row) in prompts.iter().zip(routes).zip(&together) {
        let own = adapters.iter().find(|(name, _)| Some(*name) == route).map(|(_, adapter)| adapter.clone());
        let sites: Rc<dyn Sites> = match own {
            Some(adapter) => adapter,
            None => Rc::new(Bare),
        };
        let alone = run(std::slice::from_ref(prompt), &sites);
        let [a, b] = [row, &alone[0]].map(|row| Tensor::from_slice(row.logprobs.as_ref().unwrap()));
        let off = (a - b).abs().max().double_value(&[]);
        assert!(row.token_ids == alone[0].token_ids && off < 1e-5, "{route:?} is off by {off:e}");
    }
}

#[test]
fn each_mode_trains_its_part() {
    let model = tiny("gpt2");
    let names_of = |mode| {
        let config = TinytlConfig { mode, ..Default::default() };
        let adapter = TinytlAdapter::new(config, &model, 1).unwrap();
        adapter.parameters().into_iter().map(|(name, _)| name).collect::<Vec<_>>()
    };
    let (bias, lite, both) =
        (names_of(TinytlMode::Bias), names_of(TinytlMode::LiteResidual), names_of(TinytlMode::Both));
    assert_eq!((bias.len(), lite.len(), both.len()), (13, 2 * 6, 13 + 2 * 5));
    assert!(lite.contains(&"transformer.h.1.lite_residual.final_norm.bias".to_string()), "{lite:?}");
    assert!(both.iter().all(|name| !name.ends_with("final_norm.bias")), "the last norm's bias stays zero");
}

#[test]
fn a_new_adapter_is_the_base_and_says_what_it_trains() {
    let model = tiny("llama");
    let adapter = Rc::new(TinytlAdapter::new(TinytlConfig::default(), &model, 1).unwrap());
    assert!(adapter.note().unwrap().contains("new biases that start at zero"), "{:?}", adapter.note());
    let bare: Rc<dyn Sites> = Rc::new(Bare);
    let sites: Rc<dyn Sites> = adapter;
    let [with, without] = [&sites, &bare].map(|sites| logits(&model, sites, &two_sequences()).unwrap());
    assert!(with.equal(&without));
}

#[test]
fn sizes_that_the_file_does_not_have_are_refused_before_memory_is_taken() {
    let model = tiny("llama");
    let folder = tempfile::tempdir().unwrap();
    let adapter = folder.path().join("a");
    disturbed(&model, TinytlConfig::default()).save(&adapter).unwrap();
    let path = adapter.join(pt_peft::CONFIG_FILE);
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"kernel_size\": 5", "\"kernel_size\": 64")).unwrap();
    let error = load_adapter(&adapter, &model).unwrap_err();
    assert!(matches!(&error, PeftError::Keys { shapes, .. } if shapes.len() == 2), "{error}");
    std::fs::write(&path, text.replace("\"both\"", "\"all\"")).unwrap();
    let error = load_adapter(&adapter, &model).unwrap_err();
    assert!(error.to_string().contains("`mode` is \"all\", expected \"bias\""), "{error}");
}

/// A Llama of four layers with values that are as good as random.
#[derive(Debug)]
struct Source(BTreeMap<String, Vec<i64>>);

const WIDTH: i64 = 256;

impl Source {
    fn new(config: &ModelConfig) -> Self {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let mut shapes = BTreeMap::new();
        let mut put = |name: String, shape: &[i64]| {
            shapes.insert(name, shape.to_vec());
        };
        put("model.embed_tokens.weight".into(), &[config.vocab_size, hidden]);
        put("model.norm.weight".into(), &[hidden]);
        for layer in 0..config.num_layers {
            let path = format!("model.layers.{layer}");
            for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
                put(format!("{path}.self_attn.{part}.weight"), &[hidden, hidden]);
            }
            put(format!("{path}.mlp.gate_proj.weight"), &[inner, hidden]);
            put(format!("{path}.mlp.up_proj.weight"), &[inner, hidden]);
            put(format!("{path}.mlp.down_proj.weight"), &[hidden, inner]);
            put(format!("{path}.input_layernorm.weight"), &[hidden]);
            put(format!("{path}.post_attention_layernorm.weight"), &[hidden]);
        }
        Self(shapes)
    }
}

impl TensorSource for Source {
    fn path(&self) -> &Path {
        Path::new("memory")
    }

    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<i64>> {
        self.0.get(name).cloned()
    }

    fn tensor(&self, name: &str, kind: Kind, device: Device) -> pt_model::Result<Tensor> {
        let shape = &self.0[name];
        let count = Tensor::arange(shape.iter().product::<i64>(), (Kind::Float, device)) + name.len() as f64;
        Ok(((count * 1.7).sin() * 0.05).view(shape.as_slice()).to_kind(kind))
    }

    fn nf4(&self, name: &str, kind: Kind, device: Device) -> pt_model::Result<Option<Nf4Weight>> {
        let is_linear = name.ends_with("_proj.weight") && kind == Kind::BFloat16;
        let quantize = || Ok(Nf4Weight::quantize(&self.tensor(name, kind, device)?, Nf4Options::default())?);
        is_linear.then(quantize).transpose()
    }
}

/// In f32; in bf16 with linear layers in 4 bits.
fn middling(kind: Kind) -> CausalLm {
    let raw = serde_json::json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "hidden_act": "silu",
    });
    let config = ModelConfig::from_json(Path::new("memory/config.json"), raw).unwrap();
    CausalLm::from_source(&config, &Source::new(&config), Device::Cpu, kind).unwrap()
}

/// The most bytes of tensors in one forward and backward pass over 1024 tokens, beyond weights and adapter.
fn peak(model: &CausalLm, sites: Rc<dyn Sites>) -> u64 {
    let groups: Vec<PromptGroup> = (0..4)
        .map(|row| PromptGroup::single(vec![], Completion::new((0..256).map(|i| (i * 7 + row * 31) % 512).collect())))
        .collect();
    let batch = PackedBatch::new(&groups, Device::Cpu).unwrap();
    let pass = || {
        let out = model.label_logprobs(&batch, &sites, RunOptions::default(), &LabelLogprobs::default()).unwrap();
        (-out.logprobs.sum(Kind::Float)).backward();
    };
    peak_tensor_bytes(pass).unwrap().1
}

#[test]
fn tinytl_takes_less_memory_than_lora_and_that_less_than_training_everything() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let mut model = middling(kind);
        let lora = LoraConfig { target_modules: Modules::Pattern("all-linear".into()), ..Default::default() };
        let some = LoraConfig { target_modules: names(&["q_proj", "v_proj"]), ..Default::default() };
        let lora = peak(&model, Rc::new(LoraAdapter::new(lora, &model, 1).unwrap()));
        let some = peak(&model, Rc::new(LoraAdapter::new(some, &model, 1).unwrap()));
        let bitfit = peak(&model, Rc::new(BitfitAdapter::new(BitfitConfig::default(), &model).unwrap()));
        let [bias, lite, both] = [TinytlMode::Bias, TinytlMode::LiteResidual, TinytlMode::Both].map(|mode| {
            let config = TinytlConfig { mode, ..Default::default() };
            peak(&model, disturbed(&model, config))
        });
        // In 4 bits there is nothing to compare with: such weights are not trained.
        let full = match kind {
            Kind::Float => {
                let leaves = model.train_all().unwrap();
                let full = peak(&model, Rc::new(Bare));
                drop(leaves);
                Some(full)
            }
            _ => None,
        };
        let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
        println!(
            "{kind:?}, 1024 tokens, MiB beyond the weights: BitFit {:.1}, TinyTL bias {:.1}, lite residual {:.1}, both \
             {:.1}, LoRA on queries and values {:.1}, on all layers {:.1}, everything {:.1?}",
            mib(bitfit),
            mib(bias),
            mib(lite),
            mib(both),
            mib(some),
            mib(lora),
            full.map(mib)
        );
        assert!(both < some && some < lora && full.is_none_or(|full| lora < full), "{both} {lora} {full:?}");
        assert!(bitfit < some && bias < some && bias <= both && lite < lora, "{bitfit} {bias} {lite} {both} {some}");
    }
}
