//! 1-bit deltas: against BitDelta's code path, the laws, files, and several in one batch.

use crate::laws::two_sequences;
use crate::{bf16, fixtures, nf4, sequences, tiny};
use pt_model::{CausalLm, Completion, PackedBatch, Pretrained, PromptGroup, RunOptions, Sites};
use pt_peft::testing::{Subject, adapter_laws, disturb, logits, trains_over};
use pt_peft::{
    Adapter, AdapterSet, BitDeltaAdapter, BitDeltaConfig, FineTuned, KeptWhole, LoraAdapter, LoraConfig, PeftError,
    ScaleSharing, StoredDelta, TENSOR_FILE, compress, load_adapter, tenants_linear,
};
use pt_tensor::io::{SafetensorsReader, save_safetensors};
use pt_tensor::{Device, Kind, LabelLogprobs, Tensor, no_grad};
use std::path::Path;
use std::rc::Rc;

fn pretrained(path: &Path) -> Pretrained {
    Pretrained::open(path).unwrap()
}

fn base(name: &str) -> Pretrained {
    pretrained(&fixtures().join("models").join(name).join("model"))
}

/// A tiny model with every parameter whose name `moves` moved a little.
fn tuned(name: &str, seed: f64, moves: impl Fn(&str) -> bool) -> CausalLm {
    let model = tiny(name);
    no_grad(|| {
        for (parameter, mut tensor) in model.named_parameters().unwrap() {
            if moves(&parameter) {
                let count = Tensor::arange(tensor.numel() as i64, (Kind::Float, Device::Cpu));
                let noise = ((count * 12.9898 * seed).sin() * 437.5).sin() * 0.03;
                let _ = tensor.g_add_(&noise.view_as(&tensor));
            }
        }
    });
    model
}

fn delta(name: &str, seed: f64, config: BitDeltaConfig, moves: impl Fn(&str) -> bool) -> StoredDelta {
    let model = tuned(name, seed, moves);
    compress(&base(name), FineTuned::Model(&model), config, Kind::Float, |_, _| ()).unwrap()
}

fn sharing(scale_sharing: ScaleSharing) -> BitDeltaConfig {
    BitDeltaConfig { scale_sharing, ..Default::default() }
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

#[test]
fn golden_bitdelta_signs_scales_and_logits_are_those_of_its_script() {
    for name in ["llama", "llama_untied"] {
        let case = fixtures().join("bitdelta").join(name);
        let tuned = pretrained(&case.join("fine_tuned"));
        let config = BitDeltaConfig { kept_whole: KeptWhole::All, ..Default::default() };
        let checkpoint = FineTuned::Checkpoint(&tuned);
        let made = compress(&base(name), checkpoint, config.clone(), Kind::Float, |_, _| ()).unwrap();

        // The same dictionary: masks bit for bit, scales, and what is carried whole.
        let folder = tempfile::tempdir().unwrap();
        let exported = folder.path().join("diff.safetensors");
        made.export(&exported).unwrap();
        let [ours, theirs] =
            [exported, case.join("original.safetensors")].map(|path| SafetensorsReader::open(path).unwrap());
        assert_eq!(ours.names().collect::<Vec<_>>(), theirs.names().collect::<Vec<_>>());
        let mut num_masks = 0;
        for key in theirs.names() {
            assert_eq!((ours.shape(key), ours.kind(key)), (theirs.shape(key), theirs.kind(key)), "{key}");
            let [a, b] = [&ours, &theirs].map(|reader| reader.tensor(key, Device::Cpu).unwrap());
            match key.ends_with(".coeff") {
                true => assert!(distance(&a, &b) <= 1e-6, "{key}"),
                false => assert!(a.equal(&b), "{key}"),
            }
            num_masks += usize::from(key.ends_with(".mask"));
        }
        assert_eq!(num_masks, 14);

        // Made, saved and loaded, or imported: the same logits.
        made.save(&folder.path().join("delta")).unwrap();
        let original = case.join("original.safetensors");
        let changed = StoredDelta::import(&original, &base(name), BitDeltaConfig::default(), |_, _| ()).unwrap();
        let expected = SafetensorsReader::open(case.join("expected.safetensors")).unwrap();
        let want = expected.tensor("logits", Device::Cpu).unwrap();
        let model = tiny(name);
        for delta in [made, changed, StoredDelta::load(&folder.path().join("delta")).unwrap()] {
            let sites: Rc<dyn Sites> = Rc::new(BitDeltaAdapter::new(delta, &model).unwrap());
            let off = distance(&logits(&model, &sites, &sequences(&case)).unwrap(), &want);
            println!("{name}: logits within {off:.1e}");
            assert!(off <= 1e-5, "{name}: logits are off by {off:e}");
        }
    }
}

fn check(model: &str, config: BitDeltaConfig, moves: impl Fn(&str) -> bool) {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    delta(model, 1.0, config, moves).save(&source).unwrap();
    let subject = Subject {
        new: &|model| load_adapter(&source, model),
        load: &load_adapter,
        tolerance: 5e-5,
        starts_neutral: false,
        is_mergeable: true,
    };
    adapter_laws(&subject, &mut tiny(model), &two_sequences(), folder.path()).unwrap();
    for base in [bf16(model), nf4(model)] {
        trains_over(&subject, &base, &two_sequences(), folder.path()).unwrap();
    }
}

#[test]
fn bitdelta_keeps_the_laws_with_scales_of_matrices_rows_and_groups() {
    for scale_sharing in [ScaleSharing::Matrix, ScaleSharing::Row, ScaleSharing::Group128] {
        check("llama", sharing(scale_sharing), |name| name.contains("proj"));
    }
    check("gpt2", sharing(ScaleSharing::Row), |_| true);
}

#[test]
fn bitdelta_keeps_the_laws_with_parameters_carried_whole() {
    check("llama", BitDeltaConfig::default(), |_| true);
    check("llama_untied", BitDeltaConfig::default(), |_| true);
    check("qwen2", BitDeltaConfig { kept_whole: KeptWhole::All, ..Default::default() }, |name| name.contains("proj"));
}

#[test]
fn what_a_delta_carries_whole_is_what_its_setting_says() {
    let of = |kept_whole| {
        let config = BitDeltaConfig { kept_whole, ..Default::default() };
        delta("llama", 1.0, config, |name| name.contains("proj") || name == "model.norm.weight")
    };
    let names = |delta: &StoredDelta| delta.whole().map(|(name, _)| name.to_string()).collect::<Vec<_>>();
    assert_eq!(names(&of(KeptWhole::Changed)), ["model.norm.weight"]);
    assert_eq!(names(&of(KeptWhole::None)), [""; 0]);
    let all = of(KeptWhole::All);
    assert_eq!(names(&all).len(), 6, "{:?}", names(&all));
    let bytes = all.bytes();
    // 2 layers of q, o: 32 · 32, k, v: 16 · 32, gate, up, down: 64 · 32, a bit each; embedding and 5 norms in f32.
    assert_eq!((bytes.signs, bytes.scales), (2 * (2 * 1024 + 2 * 512 + 3 * 2048) / 8, 14 * 4));
    assert_eq!(bytes.whole, 4 * (128 * 32 + 5 * 32));
}

#[test]
fn a_delta_is_refused_over_another_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta");
    delta("llama", 1.0, BitDeltaConfig::default(), |name| name.contains("proj")).save(&path).unwrap();
    assert!(BitDeltaAdapter::load(&path, &tiny("llama")).is_ok());
    let part = |part: &'static str| tuned("llama", 2.0, move |name| name.contains(part));
    for other in [part("v_proj"), part("embed_tokens")] {
        let error = BitDeltaAdapter::load(&path, &other).unwrap_err();
        assert!(error.to_string().contains("base_checksum"), "{error}");
        assert!(error.hint().unwrap().contains("made over"));
    }
    let error = BitDeltaAdapter::load(&path, &tiny("gpt2")).unwrap_err();
    let PeftError::Keys { missing, unexpected, .. } = &error else { panic!("{error}") };
    assert!(missing[0].ends_with(".signs") && unexpected[0].ends_with(".signs"), "{error}");
    // Its own layers with an adapter merged are another base, too.
    let mut merged = tiny("llama");
    load_adapter(&path, &merged).unwrap().merge_into(&mut merged).unwrap();
    assert!(load_adapter(&path, &merged).is_err());
}

#[test]
fn models_that_are_no_pair_are_refused() {
    let refused = |base: &Pretrained, tuned: &CausalLm| {
        compress(base, FineTuned::Model(tuned), BitDeltaConfig::default(), Kind::Float, |_, _| ()).unwrap_err()
    };
    let error = refused(&base("llama"), &tiny("gpt2"));
    assert!(error.to_string().contains("so it is no fine-tune of"), "{error}");
    let error = refused(&base("llama"), &tiny("mistral"));
    assert!(error.to_string().contains("has shape"), "{error}");
    let infinite = tiny("llama");
    let _ = no_grad(|| infinite.named_parameters().unwrap().pop().unwrap().1.fill_(f64::INFINITY));
    assert!(refused(&base("llama"), &infinite).to_string().contains("row"), "a difference that is not finite");
}

#[test]
fn a_fine_tune_that_unties_its_output_layer_keeps_it() {
    let mut model = tiny("llama");
    let output = model.linear_layers().last().unwrap().weight.dense().unwrap().copy() * 1.5;
    let layer = model.linear_layers_mut().unwrap().pop().unwrap();
    layer.weight = Rc::new(pt_tensor::DenseWeight::new(output).unwrap());
    let made = compress(&base("llama"), FineTuned::Model(&model), BitDeltaConfig::default(), Kind::Float, |_, _| ());
    let made = made.unwrap();
    assert_eq!(made.whole().map(|(name, _)| name).collect::<Vec<_>>(), ["lm_head.weight"]);
    let bare: Rc<dyn Sites> = Rc::new(pt_model::Bare);
    let want = logits(&model, &bare, &two_sequences()).unwrap();
    let model = tiny("llama");
    let sites: Rc<dyn Sites> = Rc::new(BitDeltaAdapter::new(made, &model).unwrap());
    assert!(distance(&logits(&model, &sites, &two_sequences()).unwrap(), &want) < 1e-5);
}

#[test]
fn damaged_deltas_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta");
    delta("llama", 1.0, sharing(ScaleSharing::Row), |_| true).save(&path).unwrap();
    let reader = SafetensorsReader::open(path.join(TENSOR_FILE)).unwrap();
    let all: Vec<(String, Tensor)> =
        reader.names().map(|name| (name.to_string(), reader.tensor(name, Device::Cpu).unwrap())).collect();
    let checksum = reader.metadata()["base_checksum"].clone();
    let layer = "model.layers.0.mlp.up_proj";
    type Tensors = Vec<(String, Tensor)>;
    let with = |checksum: &str, change: &dyn Fn(&mut Tensors)| {
        let mut tensors: Tensors = all.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        change(&mut tensors);
        save_safetensors(&path.join(TENSOR_FILE), &tensors, &[("base_checksum", checksum)]).unwrap();
        StoredDelta::load(&path).unwrap_err().to_string()
    };
    let set = |part: &str, value: &dyn Fn(&Tensor) -> Tensor| {
        with(&checksum, &|tensors| {
            let name = format!("{layer}.{part}");
            let tensor = &mut tensors.iter_mut().find(|(known, _)| *known == name).unwrap().1;
            *tensor = value(tensor);
        })
    };
    assert!(with("none", &|_| ()).contains("`base_checksum`"));
    let lacking = with(&checksum, &|tensors| tensors.retain(|(name, _)| *name != format!("{layer}.scale")));
    assert!(lacking.contains("1 missing") && lacking.contains("up_proj.scale"), "{lacking}");
    for (part, change) in [
        ("scale", (&|t: &Tensor| t.narrow(0, 0, 3)) as &dyn Fn(&Tensor) -> Tensor),
        ("scale", &|t: &Tensor| t * f64::NAN),
        ("signs", &|t: &Tensor| t.to_kind(Kind::Int)),
        ("signs", &|t: &Tensor| t.view([-1])),
    ] {
        let error = set(part, change);
        assert!(error.contains("up_proj"), "{part}: {error}");
    }
    std::fs::write(path.join(TENSOR_FILE), b"half").unwrap();
    assert!(StoredDelta::load(&path).unwrap_err().to_string().contains("not a whole safetensors file"));
    let config = path.join("adapter_config.json");
    std::fs::write(&config, r#"{"peft_type": "BITDELTA", "scale_sharing": "colum"}"#).unwrap();
    assert!(StoredDelta::load(&path).unwrap_err().to_string().contains("`scale_sharing` is \"colum\""));
    std::fs::write(&config, r#"{"peft_type": "BITDELTA", "rank": 2}"#).unwrap();
    assert!(StoredDelta::load(&path).unwrap_err().to_string().contains("`rank` is 2"));
}

#[test]
fn the_original_packing_is_read_strictly_and_a_pickle_never() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("diff.pt");
    std::fs::write(&path, b"PK\x03\x04 and so on").unwrap();
    let import = |path: &Path| StoredDelta::import(path, &base("llama"), BitDeltaConfig::default(), |_, _| ());
    let error = import(&path).unwrap_err();
    assert!(error.to_string().contains("pickle") && error.hint().unwrap().contains("save_file"), "{error}");

    let path = folder.path().join("diff.safetensors");
    let rows = delta("llama", 1.0, sharing(ScaleSharing::Row), |_| true);
    assert!(rows.export(&path).unwrap_err().to_string().contains("one scale for a matrix"));
    let made = delta("llama", 1.0, BitDeltaConfig::default(), |name| name != "model.norm.weight");
    made.export(&path).unwrap();
    let back = import(&path).unwrap();
    assert_eq!(back.bytes(), made.bytes());
    for ((path, a), (_, b)) in made.signs().zip(back.signs()) {
        assert_eq!(a.delta().unwrap(), b.delta().unwrap(), "{path}");
    }
    let reader = SafetensorsReader::open(&path).unwrap();
    let mut tensors: Vec<(String, Tensor)> =
        reader.names().map(|name| (name.to_string(), reader.tensor(name, Device::Cpu).unwrap())).collect();
    drop(reader);
    let coeff = tensors.iter().position(|(name, _)| name.ends_with("q_proj.coeff")).unwrap();
    let kept = std::mem::replace(&mut tensors[coeff].1, Tensor::from(f32::NAN));
    save_safetensors(&path, &tensors, &[]).unwrap();
    let error = import(&path).unwrap_err().to_string();
    assert!(error.contains("diff.safetensors: `") && error.contains("q_proj.coeff` is not finite"), "{error}");
    tensors[coeff].1 = kept;
    let mask = tensors.iter().position(|(name, _)| name.ends_with("q_proj.mask")).unwrap();
    tensors[mask].1 = tensors[mask].1.tr().contiguous();
    tensors.iter_mut().find(|(name, _)| name.ends_with("k_proj.coeff")).unwrap().0 += "s";
    save_safetensors(&path, &tensors, &[]).unwrap();
    let error = import(&path).unwrap_err();
    let PeftError::Keys { missing, unexpected, shapes, .. } = &error else { panic!("{error}") };
    assert_eq!((missing.len(), unexpected.len(), shapes.len()), (1, 1, 1), "{error}");
}

#[test]
fn rows_of_several_deltas_give_what_each_gives_alone() {
    // Of the second, a bias as well: its layers are computed by turns.
    for bias in [false, true] {
        let model = tiny("llama_untied");
        let make = |seed: f64, scale_sharing, with_bias: bool| {
            let moves = move |name: &str| name.ends_with("proj.weight") || (with_bias && name.ends_with("proj.bias"));
            BitDeltaAdapter::new(delta("llama_untied", seed, sharing(scale_sharing), moves), &model).unwrap()
        };
        let adapters = [make(1.0, ScaleSharing::Matrix, false), make(2.0, ScaleSharing::Row, bias)];
        let off = make(3.0, ScaleSharing::Group128, false);
        off.set_enabled(false);
        let all = [&adapters[0], &adapters[1], &off];
        let tenants = [Some(1), None, Some(0), Some(2), Some(1), Some(0)];
        for layer in model.linear_layers() {
            let width = layer.weight.size().1;
            let x = (Tensor::arange(6 * width, (Kind::Float, Device::Cpu)) * 0.7).sin().view([6, width]);
            let together = no_grad(|| tenants_linear(layer, &x, &tenants, &all)).unwrap();
            let recorded = tenants_linear(layer, &x, &tenants, &all).unwrap();
            for (row, tenant) in tenants.iter().enumerate() {
                let x = x.narrow(0, row as i64, 1);
                let alone = match tenant {
                    Some(tenant) => all[*tenant].linear(layer, &x).unwrap(),
                    None => layer.forward(&x).unwrap(),
                };
                for found in [&together, &recorded] {
                    let off = distance(&found.narrow(0, row as i64, 1), &alone);
                    assert!(off < 1e-5, "{} row {row}: {off:e}", layer.path);
                }
            }
            assert!(tenants_linear(layer, &x, &[Some(3); 6], &all).is_err());
            assert!(tenants_linear(layer, &x, &tenants[..5], &all).is_err());
        }
    }
}

#[test]
fn one_delta_may_serve_two_tenants() {
    let model = tiny("llama");
    let made = delta("llama", 1.0, BitDeltaConfig::default(), |name| name.contains("proj"));
    let adapter = BitDeltaAdapter::new(made, &model).unwrap();
    let layer = model.linear_layers().next().unwrap();
    let x = Tensor::ones([2, layer.weight.size().1], (Kind::Float, Device::Cpu));
    let rows = no_grad(|| tenants_linear(layer, &x, &[Some(0), Some(1)], &[&adapter, &adapter])).unwrap();
    assert!(distance(&rows, &adapter.linear(layer, &x).unwrap()) < 1e-5);
}

#[test]
fn an_adapter_of_a_stored_copy_trains_apart() {
    let model = tiny("llama");
    let made = delta("llama", 1.0, BitDeltaConfig::default(), |name| name.contains("proj"));
    let adapter = Rc::new(BitDeltaAdapter::new(made, &model).unwrap());
    let copy = Rc::new(BitDeltaAdapter::new(adapter.to_stored().unwrap(), &model).unwrap());
    let run = |adapter: &Rc<BitDeltaAdapter>| {
        let sites: Rc<dyn Sites> = adapter.clone();
        logits(&model, &sites, &two_sequences()).unwrap()
    };
    let before = run(&adapter);
    assert!(before.equal(&run(&copy)));
    for (_, mut scale) in adapter.parameters() {
        let _ = no_grad(|| scale.g_mul_scalar_(3.0));
    }
    assert!(distance(&run(&adapter), &before) > 1e-3);
    assert!(run(&copy).equal(&before));
    // Each stays so when they are asked in turn.
    assert!(distance(&run(&adapter), &before) > 1e-3);
}

#[test]
fn a_delta_is_routed_beside_an_adapter_of_another_method() {
    let model = tiny("llama");
    let made = delta("llama", 1.0, BitDeltaConfig::default(), |name| name.contains("proj"));
    let lora = LoraAdapter::new(LoraConfig::default(), &model, 1).unwrap();
    disturb(&lora, 0.05);
    let set = Rc::new(AdapterSet::new());
    set.insert("delta", Rc::new(BitDeltaAdapter::new(made, &model).unwrap())).unwrap();
    set.insert("lora", Rc::new(lora)).unwrap();
    let routes = [Some("lora"), None, Some("delta"), Some("lora")];
    let groups: Vec<PromptGroup> = [vec![5, 9, 14], vec![11], (1..10).collect(), vec![7, 7, 2, 40]]
        .into_iter()
        .map(|ids| PromptGroup::single(ids, Completion::new(vec![3, 8, 21])))
        .collect();
    let score = |groups: &[PromptGroup], routes: &[Option<&str>]| {
        set.set_routes(routes).unwrap();
        let (batch, sites) = (PackedBatch::new(groups, Device::Cpu).unwrap(), set.clone() as Rc<dyn Sites>);
        no_grad(|| model.label_logprobs(&batch, &sites, RunOptions::default(), &LabelLogprobs::default()))
            .unwrap()
            .logprobs
    };
    let together = score(&groups, &routes);
    let alone: Vec<Tensor> =
        groups.iter().zip(routes).map(|(group, route)| score(std::slice::from_ref(group), &[route])).collect();
    let off = distance(&together, &Tensor::cat(&alone, 0));
    assert!(off < 1e-5, "off by {off:e}");
    assert!(distance(&together, &score(&groups, &[None; 4])) > 1e-3);
}

#[test]
fn deltas_add_up_in_a_set() {
    let model = tiny("llama");
    let make = |seed| {
        let made = delta("llama", seed, BitDeltaConfig::default(), |name| name.contains("proj"));
        Rc::new(BitDeltaAdapter::new(made, &model).unwrap())
    };
    let set = AdapterSet::new();
    set.insert("one", make(1.0)).unwrap();
    set.insert("two", make(2.0)).unwrap();
    set.set_active(&["one", "two"]).unwrap();
    let sites: Rc<dyn Sites> = Rc::new(set);
    let both = logits(&model, &sites, &two_sequences()).unwrap();
    let mut merged = tiny("llama");
    make(1.0).merge_into(&mut merged).unwrap();
    make(2.0).merge_into(&mut merged).unwrap();
    let bare: Rc<dyn Sites> = Rc::new(pt_model::Bare);
    assert!(distance(&logits(&merged, &bare, &two_sequences()).unwrap(), &both) < 5e-5);
}
