use crate::common::{cases, read_json, smollm2};
use pt_model::gguf::Gguf;
use pt_model::{Pretrained, Tokenizer};
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
    std::fs::write(folder.path().join("config.json"), r#"{"eos_token_id": 7}"#).unwrap();
    assert_eq!(Tokenizer::from_file(folder.path()).unwrap().eos_ids, [2, 7]);
    std::fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [2, 0]}"#).unwrap();
    assert_eq!(Tokenizer::from_file(folder.path()).unwrap().eos_ids, [2, 0]);
    std::fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": "x"}"#).unwrap();
    let error = Tokenizer::from_file(folder.path()).unwrap_err().to_string();
    assert!(error.contains("generation_config.json") && error.contains("`eos_token_id`"), "{error}");
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
