use crate::common::{cases, fixtures, smollm2};
use pt_model::{ModelError, Pretrained};
use pt_tensor::{Device, Kind};
use std::path::Path;

fn copy_folder(from: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.path().join(path.file_name().unwrap())).unwrap();
    }
    to
}

#[test]
fn golden_gguf_models_are_the_folders_they_were_made_from() {
    for folder in cases("gguf_models") {
        let name = folder.file_name().unwrap().to_str().unwrap().to_string();
        let from_gguf = Pretrained::open(folder.join("model.gguf")).unwrap();
        let from_folder = Pretrained::open(fixtures("models").join(&name).join("model")).unwrap();
        assert_eq!(from_gguf.tensors.names(), from_folder.tensors.names(), "{name}");
        for tensor in from_folder.tensors.names() {
            let read = |p: &Pretrained| p.tensors.tensor(&tensor, Kind::Float, Device::Cpu).unwrap();
            let (found, expected) = (read(&from_gguf), read(&from_folder));
            assert_eq!(from_gguf.tensors.shape(&tensor), Some(expected.size()), "{name}, {tensor}");
            assert_eq!(found, expected, "{name}, {tensor}");
        }
        let (mut found, mut expected) = (from_gguf.config, from_folder.config);
        // Numbers are f32 in GGUF, and ids stand with the tokenizer, which these files do not carry.
        assert!(
            (found.norm_eps / expected.norm_eps - 1.0).abs() < 1e-6
                && (found.rope_theta / expected.rope_theta - 1.0).abs() < 1e-6
        );
        for config in [&mut found, &mut expected] {
            (config.norm_eps, config.rope_theta) = (1e-5, 1e4);
            (config.bos_token_id, config.eos_token_ids, config.pad_token_id) = (None, vec![], None);
            config.torch_dtype = None;
            config.raw.clear();
        }
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn smollm2_opens_with_every_tensor_in_place() {
    let pretrained = Pretrained::open(smollm2()).unwrap();
    let config = &pretrained.config;
    assert_eq!((config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim), (30, 9, 3, 64));
    assert_eq!((config.vocab_size, config.rope_theta, config.tie_word_embeddings), (49152, 100_000.0, true));
    assert_eq!(pretrained.tensors.names().len(), 272);
    let weight =
        pretrained.tensors.tensor("model.layers.29.self_attn.k_proj.weight", Kind::BFloat16, Device::Cpu).unwrap();
    assert_eq!((weight.size(), weight.kind()), (vec![192, 576], Kind::BFloat16));
}

#[test]
fn a_path_that_is_no_model_is_an_error_that_says_why() {
    let check = |path: &Path, part: &str| {
        let error = Pretrained::open(path).unwrap_err();
        assert!(error.to_string().contains(part), "{error}: no {part:?}");
        assert!(error.hint().is_some(), "{error}");
    };
    let folder = tempfile::tempdir().unwrap();
    check(&folder.path().join("nothing"), "cannot read");
    check(&folder.path().join("nothing.gguf"), "cannot read");
    check(folder.path(), "no config.json");
    let file = folder.path().join("x.bin");
    std::fs::write(&file, "x").unwrap();
    check(&file, "neither a folder nor a .gguf file");

    let llama = copy_folder(&fixtures("models/llama/model"));
    std::fs::rename(llama.path().join("model.safetensors"), llama.path().join("pytorch_model.bin")).unwrap();
    check(llama.path(), "a pickle");
    std::fs::remove_file(llama.path().join("pytorch_model.bin")).unwrap();
    check(llama.path(), "no model.safetensors");
    std::fs::write(llama.path().join("config.json"), "{").unwrap();
    check(llama.path(), "config.json: not valid JSON");

    let sharded = copy_folder(&fixtures("models/llama_sharded/model"));
    std::fs::remove_file(sharded.path().join("model-00002-of-00003.safetensors")).unwrap();
    check(sharded.path(), "model-00002-of-00003.safetensors");
}

#[test]
fn a_tensor_that_is_not_there_is_named_with_the_nearest() {
    let pretrained = Pretrained::open(fixtures("models/llama/model")).unwrap();
    let error =
        pretrained.tensors.tensor("model.layers.0.self_attn.q_pro.weight", Kind::Float, Device::Cpu).unwrap_err();
    assert!(
        matches!(&error, ModelError::MissingTensor { near: Some(near), .. } if near == "model.layers.0.self_attn.q_proj.weight"),
        "{error:?}"
    );
}
