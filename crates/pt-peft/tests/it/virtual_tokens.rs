//! Prompt tuning and prefix tuning: against PEFT's numbers and files, and what holds for virtual tokens.

use crate::laws::two_sequences;
use crate::{bf16, fixtures, nf4, sequences, tiny};
use pt_model::{
    Bare, CausalLm, Completion, GenerateConfig, ModelError, PackedBatch, PromptGroup, RunOptions, Sites, Tokenizer,
    VirtualTokens, generate,
};
use pt_peft::testing::{Subject, adapter_laws, disturb, logits, trains_over};
use pt_peft::{
    Adapter, AdapterSet, CONFIG_FILE, LoraAdapter, LoraConfig, MethodConfig, PeftError, PrefixInit,
    PrefixTuningAdapter, PrefixTuningConfig, PromptInit, PromptTuningAdapter, PromptTuningConfig, TENSOR_FILE,
    load_adapter,
};
use pt_tensor::io::SafetensorsReader;
use pt_tensor::{AdamW, AdamWConfig, Device, Kind, LabelLogprobs, Tensor, no_grad};
use serde_json::Value;
use std::path::Path;
use std::rc::Rc;

fn setting(case: &Path, key: &str) -> String {
    let text = std::fs::read_to_string(case.join("case.toml")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{key} = ")));
    line.unwrap_or_else(|| panic!("{}: no `{key}`", case.display())).trim_matches('"').to_string()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Keys, shapes and dtypes of an adapter's file.
fn header(folder: &Path) -> Vec<(String, Vec<i64>, Kind)> {
    let reader = SafetensorsReader::open(folder.join(TENSOR_FILE)).unwrap();
    let entry = |name: &str| {
        let kind = reader.tensor(name, Device::Cpu).unwrap().kind();
        (name.to_string(), reader.shape(name).unwrap().to_vec(), kind)
    };
    reader.names().map(entry).collect()
}

fn check(case: &Path) {
    let name = case.file_name().unwrap().to_string_lossy().into_owned();
    let model = tiny(&setting(case, "base"));
    let sequences = sequences(case);
    let expected = SafetensorsReader::open(case.join("expected.safetensors")).unwrap();
    let want = |tensor: &str| expected.tensor(tensor, Device::Cpu).unwrap();
    let close = |what: &str, value: &Tensor, tensor: &str, atol: f64| {
        let want = want(tensor).view_as(value);
        let off = (value - want).abs().max().double_value(&[]);
        println!("{name}: {what} within {off:.1e}");
        assert!(off <= atol, "{name}: {what} is off by {off:e}, tolerance {atol:e}");
    };
    let atol: f64 = setting(case, "atol").parse().unwrap();

    let folder = case.join("adapter");
    let adapter = load_adapter(&folder, &model).unwrap();
    let sites: Rc<dyn Sites> = adapter.clone();
    close("logits", &logits(&model, &sites, &sequences).unwrap(), "logits", atol);
    let bare: Rc<dyn Sites> = Rc::new(Bare);
    close("logits without", &logits(&model, &bare, &sequences).unwrap(), "base_logits", atol);

    let generated = Vec::<Vec<i64>>::try_from(want("generated")).unwrap();
    let config = GenerateConfig { max_new_tokens: generated[0].len(), ..Default::default() };
    let rows = generate(&model, None, &sequences, &config, &sites, |_, _| true).unwrap();
    let rows: Vec<Vec<i64>> = rows.into_iter().map(|row| row.token_ids).collect();
    assert_eq!(rows, generated, "{name}: greedy generation");

    let saved = tempfile::tempdir().unwrap();
    let saved = saved.path().join("adapter");
    adapter.save(&saved).unwrap();
    assert_eq!(header(&saved), header(&folder), "{name}: tensors of the file");
    let mut theirs = json(&folder.join(CONFIG_FILE));
    theirs.as_object_mut().unwrap().remove("peft_version");
    assert_eq!(json(&saved.join(CONFIG_FILE)), theirs, "{name}: settings of the file");

    // The loaded adapter trains, or where the file does not hold what is trained, a new one with PEFT's start.
    let settings = MethodConfig::from_folder(&folder).unwrap();
    let adapter = match settings.check_can_go_on(&folder) {
        Ok(()) => adapter,
        Err(_) => settings.create(&model, None, 0).unwrap(),
    };
    let theirs = |name: &str| if name == "prompt_embeddings" { "embedding.weight" } else { name }.to_string();
    for (own, tensor) in adapter.parameters() {
        no_grad(|| tensor.shallow_clone().copy_(&want(&format!("start.{}", theirs(&own)))));
    }
    let sites: Rc<dyn Sites> = adapter.clone();
    let group = |ids: &Vec<i64>| PromptGroup::single(vec![], Completion::new(ids.clone()));
    let batch = PackedBatch::new(&sequences.iter().map(group).collect::<Vec<_>>(), Device::Cpu).unwrap();
    let out = model.label_logprobs(&batch, &sites, RunOptions::default(), &LabelLogprobs::default()).unwrap();
    let loss = -out.logprobs.mean(Kind::Float);
    close("loss", &loss.view([1]), "loss", 1e-5);
    loss.backward();
    let number = |key: &str| setting(case, key).parse::<f64>().unwrap();
    let config = AdamWConfig { weight_decay: number("weight_decay"), ..Default::default() };
    for (own, tensor) in adapter.parameters() {
        close(&format!("gradient of {own}"), &tensor.grad(), &format!("grad.{}", theirs(&own)), 1e-5);
    }
    let mut optimizer = AdamW::new(adapter.parameters(), config).unwrap();
    optimizer.step(number("learning_rate")).unwrap();
    for (own, tensor) in adapter.parameters() {
        close(&format!("{own} after a step"), &tensor.detach(), &format!("step.{}", theirs(&own)), 1e-5);
    }
}

fn check_area(area: &str, at_least: usize) {
    let mut cases: Vec<_> =
        std::fs::read_dir(fixtures().join(area)).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    assert!(cases.len() >= at_least, "{cases:?}");
    cases.iter().for_each(|case| check(case));
}

#[test]
fn golden_prompt_tuning_of_peft_gives_its_values_tokens_steps_and_files() {
    check_area("prompt_tuning", 4);
}

#[test]
fn golden_prefix_tuning_of_peft_gives_its_values_tokens_steps_and_files() {
    check_area("prefix_tuning", 6);
}

#[test]
fn golden_prompt_tuning_starts_from_a_text_as_peft_does() {
    let case = fixtures().join("prompt_tuning/text");
    let model = tiny(&setting(&case, "base"));
    let tokenizer = Tokenizer::from_file(&case.join("tokenizer")).unwrap();
    let config = PromptTuningConfig::from_peft_file(&case.join("adapter").join(CONFIG_FILE)).unwrap();
    let adapter = PromptTuningAdapter::new(config.clone(), &model, Some(&tokenizer), 0).unwrap();
    let expected = SafetensorsReader::open(case.join("expected.safetensors")).unwrap();
    assert!(adapter.parameters()[0].1.detach().equal(&expected.tensor("text_start", Device::Cpu).unwrap()));
    let error = PromptTuningAdapter::new(config, &model, None, 0).unwrap_err();
    assert!(error.to_string().contains("the model has no tokenizer"), "{error}");
}

fn keeps_the_laws(model: &str, config: MethodConfig) {
    let folder = tempfile::tempdir().unwrap();
    let subject = Subject {
        new: &|model| config.create(model, None, 3),
        load: &load_adapter,
        tolerance: 2e-5,
        starts_neutral: false,
        is_mergeable: false,
    };
    adapter_laws(&subject, &mut tiny(model), &two_sequences(), folder.path()).unwrap();
    for base in [bf16(model), nf4(model)] {
        trains_over(&subject, &base, &two_sequences(), folder.path()).unwrap();
    }
}

fn prompt(init: PromptInit) -> PromptTuningConfig {
    PromptTuningConfig { num_virtual_tokens: 5, init, ..Default::default() }
}

fn prefix() -> PrefixTuningConfig {
    PrefixTuningConfig { num_virtual_tokens: 5, ..Default::default() }
}

#[test]
fn prompt_tuning_keeps_the_laws() {
    keeps_the_laws("llama", MethodConfig::PromptTuning(prompt(PromptInit::SampleVocab)));
    keeps_the_laws("gpt2", MethodConfig::PromptTuning(prompt(PromptInit::SampleVocab)));
    keeps_the_laws("mistral_sliding", MethodConfig::PromptTuning(prompt(PromptInit::Random)));
}

#[test]
fn prefix_tuning_keeps_the_laws() {
    for model in ["llama", "gpt2", "mistral_sliding"] {
        keeps_the_laws(model, MethodConfig::PrefixTuning(prefix()));
    }
    keeps_the_laws("qwen2", MethodConfig::PrefixTuning(PrefixTuningConfig { init: PrefixInit::Zero, ..prefix() }));
}

#[test]
fn prefix_tuning_keeps_the_laws_with_a_projection() {
    let config = PrefixTuningConfig { prefix_projection: true, encoder_hidden_size: Some(12), ..prefix() };
    keeps_the_laws("llama", MethodConfig::PrefixTuning(config.clone()));
    keeps_the_laws("gpt2", MethodConfig::PrefixTuning(PrefixTuningConfig { encoder_hidden_size: None, ..config }));
}

#[test]
fn a_projected_prefix_loads_as_a_plain_one_and_says_that_training_cannot_go_on() {
    let model = tiny("llama");
    let config = PrefixTuningConfig { prefix_projection: true, ..prefix() };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("adapter");
    PrefixTuningAdapter::new(config, &model, 1).unwrap().save(&folder).unwrap();
    let names = |adapter: &dyn Adapter| adapter.parameters().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    let loaded = load_adapter(&folder, &model).unwrap();
    assert_eq!(names(loaded.as_ref()), ["prompt_embeddings"]);
    let error = MethodConfig::from_folder(&folder).unwrap().check_can_go_on(&folder).unwrap_err();
    assert!(error.to_string().contains("training cannot go on from it"), "{error}");
    // Saved again, it is the same file.
    let again = folder.with_file_name("again");
    loaded.save(&again).unwrap();
    for name in [CONFIG_FILE, TENSOR_FILE] {
        assert_eq!(std::fs::read(folder.join(name)).unwrap(), std::fs::read(again.join(name)).unwrap(), "{name}");
    }
}

#[test]
fn a_prefix_of_zeros_is_zero_through_a_projection_too() {
    let model = tiny("llama");
    for prefix_projection in [false, true] {
        let config = PrefixTuningConfig { prefix_projection, init: PrefixInit::Zero, ..prefix() };
        let adapter = PrefixTuningAdapter::new(config, &model, 1).unwrap();
        let Some(VirtualTokens::KeysValues(layers)) = adapter.virtual_tokens().unwrap() else { panic!("a prefix") };
        assert_eq!(layers.len(), 2);
        for (key, value) in layers {
            assert_eq!(key.size(), [5, 2, 8]);
            assert!(key.eq(0.0).all().int64_value(&[]) == 1 && value.eq(0.0).all().int64_value(&[]) == 1);
        }
    }
}

#[test]
fn a_prompt_of_embeddings_is_a_prompt_of_tokens() {
    // Prompt tuning with the embeddings of real tokens gives what those tokens give before the sequence.
    for name in ["llama", "gpt2", "mistral_sliding"] {
        let model = tiny(name);
        let adapter = Rc::new(PromptTuningAdapter::new(prompt(PromptInit::Random), &model, None, 1).unwrap());
        let ids = [9, 31, 7, 7, 100];
        let rows = model.embedding().1.index_select(0, &Tensor::from_slice(&ids));
        no_grad(|| adapter.parameters()[0].1.shallow_clone().copy_(&rows));
        let sites: Rc<dyn Sites> = adapter;
        let bare: Rc<dyn Sites> = Rc::new(Bare);
        let ours = logits(&model, &sites, &two_sequences()).unwrap();
        let whole = |own: &Vec<i64>| {
            let all: Vec<i64> = ids.iter().chain(own).copied().collect();
            logits(&model, &bare, &[all]).unwrap().narrow(0, ids.len() as i64, own.len() as i64)
        };
        let theirs = Tensor::cat(&two_sequences().iter().map(whole).collect::<Vec<_>>(), 0);
        let off = (ours - theirs).abs().max().double_value(&[]);
        assert!(off < 2e-5, "{name}: off by {off:e}");
    }
}

fn too_long(result: Result<impl Sized, ModelError>) -> (usize, usize) {
    match result.map(|_| ()).unwrap_err() {
        ModelError::TooLong { length, virtual_tokens, .. } => (length, virtual_tokens),
        other => panic!("{other}"),
    }
}

#[test]
fn virtual_tokens_take_room_in_the_context() {
    let model = tiny("llama"); // 64 tokens of context
    for config in [MethodConfig::PromptTuning(prompt(PromptInit::Random)), MethodConfig::PrefixTuning(prefix())] {
        assert_eq!(config.num_virtual_tokens(), 5);
        let sites: Rc<dyn Sites> = config.create(&model, None, 1).unwrap();
        let run = |length: usize| {
            let group = PromptGroup::single(vec![], Completion::new(vec![1; length]));
            let batch = PackedBatch::new(&[group], Device::Cpu).unwrap();
            model.hidden_states(&batch, &sites, RunOptions::default())
        };
        assert_eq!(run(59).unwrap().size()[0], 59);
        assert_eq!(too_long(run(60)), (65, 5));
        let complete =
            |length: usize| generate(&model, None, &[vec![1; length]], &GenerateConfig::default(), &sites, |_, _| true);
        assert_eq!(complete(58).unwrap()[0].token_ids.len(), 1);
        assert_eq!(too_long(complete(59)), (65, 5));
        let text = complete(59).unwrap_err().to_string();
        assert!(text.contains("65 tokens, 5 of them the adapter's virtual ones, is longer"), "{text}");
    }
    for count in [64, i64::MAX] {
        let config = PrefixTuningConfig { num_virtual_tokens: count, ..prefix() };
        let error = PrefixTuningAdapter::new(config, &model, 1).unwrap_err();
        assert!(error.to_string().contains("less than the model's context, 64 tokens"), "{error}");
    }
}

#[test]
fn one_set_of_virtual_tokens_at_a_time_beside_other_methods() {
    let model = tiny("llama");
    let prompt: Rc<dyn Adapter> =
        Rc::new(PromptTuningAdapter::new(prompt(PromptInit::SampleVocab), &model, None, 1).unwrap());
    let prefix: Rc<dyn Adapter> = Rc::new(PrefixTuningAdapter::new(prefix(), &model, 1).unwrap());
    let lora = Rc::new(LoraAdapter::new(LoraConfig { rank: 4, ..Default::default() }, &model, 1).unwrap());
    disturb(lora.as_ref(), 0.1);
    let set = AdapterSet::new();
    for (name, adapter) in [("prompt", prompt.clone()), ("prefix", prefix.clone()), ("lora", lora.clone() as _)] {
        set.insert(name, adapter).unwrap();
    }
    let error = set.set_active(&["prompt", "prefix"]).unwrap_err();
    assert!(matches!(&error, PeftError::State(why) if why.contains("`prompt_embeddings`")), "{error}");
    let set = Rc::new(set);
    let sites: Rc<dyn Sites> = set.clone();
    let run = |sites: &Rc<dyn Sites>| logits(&model, sites, &two_sequences()).unwrap();
    for (name, adapter) in [("prompt", prompt), ("prefix", prefix)] {
        set.set_active(&[name]).unwrap();
        assert_eq!(sites.num_virtual_tokens(), 5);
        let alone: Rc<dyn Sites> = adapter;
        assert!(run(&sites).equal(&run(&alone)), "{name}");
        set.set_active(&[name, "lora"]).unwrap();
        assert!((run(&sites) - run(&alone)).abs().max().double_value(&[]) > 1e-2, "{name} with lora");
    }
    // Of prompts with adapters of their own, all have it or none.
    let routed = |names: &[Option<&str>]| {
        set.set_routes(names).unwrap();
        let rows = generate(&model, None, &two_sequences(), &GenerateConfig::default(), &sites, |_, _| true);
        rows.map(|rows| (rows, run(&sites))).map_err(|error| error.to_string())
    };
    let (rows, values) = routed(&[Some("prefix"); 2]).unwrap();
    set.clear_routes();
    set.set_active(&["prefix"]).unwrap();
    assert!(values.equal(&run(&sites)));
    let plain = generate(&model, None, &two_sequences(), &GenerateConfig::default(), &sites, |_, _| true).unwrap();
    assert_eq!(rows, plain);
    let error = routed(&[Some("prefix"), None]).unwrap_err();
    assert!(error.contains("`prefix` brings virtual tokens"), "{error}");
    set.clear_routes();
    set.set_active(&["lora"]).unwrap();
    assert_eq!(sites.num_virtual_tokens(), 0);
    let alone: Rc<dyn Sites> = lora;
    assert!(run(&sites).equal(&run(&alone)));
}

#[test]
fn samples_of_a_prompt_share_the_virtual_tokens() {
    let model: CausalLm = tiny("llama");
    for config in [MethodConfig::PromptTuning(prompt(PromptInit::SampleVocab)), MethodConfig::PrefixTuning(prefix())] {
        let sites: Rc<dyn Sites> = config.create(&model, None, 1).unwrap();
        let config = GenerateConfig { max_new_tokens: 6, num_samples: 2, ..Default::default() };
        let rows = generate(&model, None, &two_sequences(), &config, &sites, |_, _| true).unwrap();
        let alone = GenerateConfig { num_samples: 1, ..config };
        for (prompt, pair) in two_sequences().into_iter().zip(rows.chunks(2)) {
            let single = generate(&model, None, &[prompt], &alone, &sites, |_, _| true).unwrap();
            assert!(pair.iter().all(|row| row.token_ids == single[0].token_ids));
        }
    }
}
