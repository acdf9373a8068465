use crate::common::{cases, read_json, smollm2};
use pt_model::gguf::{Gguf, Value};
use pt_model::{ChatTemplate, Pretrained, Tokenizer};
use serde_json::json;
use std::path::Path;

fn from_gguf(path: &Path) -> Tokenizer {
    let gguf = Gguf::open(path).unwrap();
    Tokenizer::from_gguf(path, gguf.metadata()).unwrap().expect("a tokenizer")
}

fn check(tokenizer: &Tokenizer, folder: &Path) {
    for case in read_json(&folder.join("expected.json")).as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<i64> = serde_json::from_value(case["ids"].clone()).unwrap();
        let place = format!("{}, {text:?}", folder.display());
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{place}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), case["decoded"].as_str().unwrap(), "{place}");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), case["skipped"].as_str().unwrap(), "{place}");
    }
}

#[test]
fn golden_tokenizer_ids_equal_those_of_python() {
    for folder in cases("tokenizer") {
        let is_real = folder.ends_with("smollm2-135m-instruct");
        check(&from_gguf(&if is_real { smollm2() } else { folder.join("vocab.gguf") }), &folder);
    }
}

#[test]
fn golden_tokenizer_saved_as_json_is_the_same_tokenizer() {
    for folder in cases("tokenizer").iter().filter(|folder| folder.join("vocab.gguf").exists()) {
        let saved = tempfile::tempdir().unwrap();
        let tokenizer = from_gguf(&folder.join("vocab.gguf"));
        tokenizer.save(saved.path()).unwrap();
        let again = Tokenizer::from_file(saved.path()).unwrap();
        check(&again, folder);
        assert_eq!(
            (again.eos_ids.as_slice(), again.bos_token(), again.eos_token()),
            (&[2][..], Some("<|im_start|>"), Some("<|im_end|>"))
        );
        assert_eq!(again.vocab_size(), tokenizer.vocab_size());
    }
}

#[test]
fn smollm2_stops_at_the_end_of_a_turn() {
    let tokenizer = Pretrained::open(smollm2()).unwrap().tokenizer.unwrap();
    assert_eq!(tokenizer.eos_ids, [2]);
    assert_eq!(tokenizer.id_to_token(2).as_deref(), Some("<|im_end|>"));
    assert_eq!((tokenizer.token_to_id("<|im_start|>"), tokenizer.vocab_size()), (Some(1), 49152));
    assert!(tokenizer.is_special(2) && !tokenizer.is_special(500));
    // Nothing is put before a text.
    assert!(tokenizer.encode("").unwrap().is_empty());
}

#[test]
fn end_ids_of_a_folder_come_from_all_its_files() {
    let folder = tempfile::tempdir().unwrap();
    let case = cases("tokenizer").into_iter().find(|folder| folder.ends_with("qwen2")).unwrap();
    from_gguf(&case.join("vocab.gguf")).save(folder.path()).unwrap();
    std::fs::remove_file(folder.path().join("generation_config.json")).unwrap();
    std::fs::write(folder.path().join("config.json"), r#"{"eos_token_id": 7}"#).unwrap();
    assert_eq!(Tokenizer::from_file(folder.path()).unwrap().eos_ids, [2, 7]);
    std::fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [2, 0]}"#).unwrap();
    assert_eq!(Tokenizer::from_file(folder.path()).unwrap().eos_ids, [2, 0]);
    std::fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": "x"}"#).unwrap();
    let error = Tokenizer::from_file(folder.path()).unwrap_err().to_string();
    assert!(error.contains("generation_config.json") && error.contains("`eos_token_id`"), "{error}");
}

/// Writes `post_processor` into a saved tokenizer.json, and `config` beside it.
fn rewrite(folder: &Path, post_processor: serde_json::Value, config: serde_json::Value) {
    let path = folder.join("tokenizer.json");
    let mut json = read_json(&path);
    json["post_processor"] = post_processor;
    std::fs::write(&path, json.to_string()).unwrap();
    std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
}

#[test]
fn the_begin_token_that_a_folder_asks_for_is_known_and_not_added() {
    let folder = tempfile::tempdir().unwrap();
    let case = cases("tokenizer").into_iter().find(|folder| folder.ends_with("smollm")).unwrap();
    let tokenizer = from_gguf(&case.join("vocab.gguf"));
    assert_eq!(tokenizer.bos_to_add(), None);
    tokenizer.save(folder.path()).unwrap();
    let template = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}});
    // Llama 3 nests it, and says nothing in its configuration.
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
    let nested = json!({"type": "Sequence", "processors": [byte_level, template]});
    let end_only = json!({"type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}}});
    let bos = json!({"bos_token": "<|im_start|>"});
    for (processor, config, expected) in [
        (template.clone(), bos.clone(), Some(1)),
        (nested, json!({}), Some(1)),
        (template, json!({"bos_token": "<|im_start|>", "add_bos_token": false}), None),
        (serde_json::Value::Null, json!({"bos_token": "<|im_end|>", "add_bos_token": true}), Some(2)),
        (end_only, bos, None),
    ] {
        rewrite(folder.path(), processor, config);
        let tokenizer = Tokenizer::from_file(folder.path()).unwrap();
        assert_eq!(tokenizer.bos_to_add(), expected);
        assert_ne!(tokenizer.encode("a").unwrap()[0], 1, "the caller adds it");
    }
    rewrite(folder.path(), serde_json::Value::Null, json!({"add_bos_token": true}));
    let error = Tokenizer::from_file(folder.path()).unwrap_err().to_string();
    assert!(error.contains("`add_bos_token`"), "{error}");
}

#[test]
fn the_begin_token_that_a_gguf_file_asks_for_is_known_and_exported() {
    let key = "tokenizer.ggml.add_bos_token";
    for (name, flag, expected) in [
        ("smollm", Some(true), Some(1)),
        ("smollm", None, None),
        ("llama-bpe", None, Some(1)),
        ("llama-bpe", Some(false), None),
    ] {
        let path = cases("tokenizer").into_iter().find(|folder| folder.ends_with(name)).unwrap().join("vocab.gguf");
        let mut metadata = Gguf::open(&path).unwrap().metadata().clone();
        if let Some(flag) = flag {
            metadata.insert(key.into(), Value::Bool(flag));
        }
        let tokenizer = Tokenizer::from_gguf(&path, &metadata).unwrap().unwrap();
        assert_eq!(tokenizer.bos_to_add(), expected, "{name} {flag:?}");
        let folder = tempfile::tempdir().unwrap();
        tokenizer.save(folder.path()).unwrap();
        assert_eq!(Tokenizer::from_file(folder.path()).unwrap().bos_to_add(), expected, "{name} {flag:?}");
        assert_eq!(read_json(&folder.path().join("tokenizer.json"))["post_processor"].is_null(), expected.is_none());
    }
    // SmolLM2's file says no.
    assert_eq!(Pretrained::open(smollm2()).unwrap().tokenizer.unwrap().bos_to_add(), None);
}

#[test]
fn an_exported_folder_keeps_its_template_and_its_end_ids() {
    let case = cases("tokenizer").into_iter().find(|folder| folder.ends_with("qwen2")).unwrap();
    let [source, target] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    from_gguf(&case.join("vocab.gguf")).save(source.path()).unwrap();
    let write = |name: &str, text: &str| std::fs::write(source.path().join(name), text).unwrap();
    write("chat_template.jinja", "a{{ eos_token }}\n");
    write("generation_config.json", r#"{"eos_token_id": [0, 5], "temperature": 0.6}"#);
    let tokenizer = Tokenizer::from_file(source.path()).unwrap();
    tokenizer.save(target.path()).unwrap();
    assert_eq!(Tokenizer::from_file(target.path()).unwrap().eos_ids, tokenizer.eos_ids);
    assert_eq!(tokenizer.eos_ids, [2, 0, 5]);
    assert_eq!(std::fs::read_to_string(target.path().join("chat_template.jinja")).unwrap(), "a{{ eos_token }}\n");
    let template = ChatTemplate::from_folder(target.path()).unwrap().unwrap();
    assert_eq!(template.render(&[], None, false).unwrap(), "a<|im_end|>");
    let saved = read_json(&target.path().join("generation_config.json"));
    assert_eq!(saved, serde_json::json!({"eos_token_id": [2, 0, 5], "temperature": 0.6}));
}

#[test]
fn end_ids_of_a_gguf_file_stand_in_its_export() {
    let case = cases("tokenizer").into_iter().find(|folder| folder.ends_with("qwen2")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut tokenizer = from_gguf(&case.join("vocab.gguf"));
    tokenizer.eos_ids = vec![2, 9];
    tokenizer.save(folder.path()).unwrap();
    assert_eq!(Tokenizer::from_file(folder.path()).unwrap().eos_ids, [2, 9]);
}

#[test]
fn a_broken_tokenizer_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = Tokenizer::from_file(folder.path()).unwrap_err();
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
    std::fs::write(folder.path().join("tokenizer.json"), "{\"version\": \"1.0\"").unwrap();
    let error = Tokenizer::from_file(folder.path()).unwrap_err();
    assert!(error.to_string().contains("tokenizer.json") && error.hint().is_some(), "{error}");
}

#[test]
fn ids_without_a_token_decode_to_nothing_and_negative_ones_are_refused() {
    let case = cases("tokenizer").into_iter().find(|folder| folder.ends_with("smollm")).unwrap();
    let tokenizer = from_gguf(&case.join("vocab.gguf"));
    assert_eq!(tokenizer.decode(&[1_000_000], false).unwrap(), "");
    assert!(tokenizer.decode(&[-100], false).unwrap_err().to_string().contains("-100"));
}
