//! Where completions end.

use crate::common::fixtures;
use crate::{bare, tiny};
use pt_model::gguf::Gguf;
use pt_model::{FinishReason, GenerateConfig, ModelError, Tokenizer, generate};
use pt_tensor::{Kind, no_grad};

fn tokenizer() -> Tokenizer {
    let path = fixtures("tokenizer/smollm").join("vocab.gguf");
    Tokenizer::from_gguf(&path, Gguf::open(&path).unwrap().metadata()).unwrap().unwrap()
}

#[test]
fn a_completion_ends_before_a_stop_text() {
    let (model, tokenizer) = (tiny("llama", Kind::Float), tokenizer());
    let base =
        GenerateConfig { max_new_tokens: 16, temperature: 1.0, seed: 3, with_logprobs: true, ..Default::default() };
    let prompts = [vec![5, 9, 14], vec![11, 12]];
    let run = |config: &GenerateConfig| {
        let mut heard = vec![vec![]; prompts.len()];
        let hear = |row: usize, token: i64| {
            heard[row].push(token);
            true
        };
        let rows = generate(&model, Some(&tokenizer), &prompts, config, &bare(), hear).unwrap();
        (rows, heard)
    };
    let (free, heard) = run(&base);
    assert_eq!(heard[0], free[0].token_ids, "without stop texts every token is heard");
    let text = free[0].text.clone().unwrap();
    assert_eq!(text, tokenizer.decode(&free[0].token_ids, true).unwrap());
    // Two characters out of the middle, so that the text may begin or end inside a token.
    for at in 4..9 {
        let stop: String = text.chars().skip(at).take(2).collect();
        let config = GenerateConfig { stop: vec![stop.clone()], ..base.clone() };
        let (rows, heard) = run(&config);
        let row = &rows[0];
        let before = &text[..text.find(&stop).unwrap()];
        assert_eq!((row.text.as_deref(), row.finish_reason), (Some(before), FinishReason::Stop), "{stop:?}");
        assert_eq!(row.token_ids, free[0].token_ids[..row.token_ids.len()]);
        assert_eq!(row.logprobs.as_ref().unwrap().len(), row.token_ids.len());
        assert!(tokenizer.decode(&row.token_ids, false).unwrap().starts_with(before));
        let told = tokenizer.decode(&heard[0], false).unwrap();
        assert!(before.starts_with(&told), "{told:?} was heard, the completion is {before:?}");
        if rows[1].finish_reason == FinishReason::Length {
            assert_eq!(heard[1], rows[1].token_ids, "what was held back is heard at the end");
        }
    }
}

#[test]
fn stop_texts_without_a_tokenizer_and_empty_ones_are_refused() {
    let model = tiny("llama", Kind::Float);
    let config = |stop: &str| GenerateConfig { stop: vec![stop.into()], ..Default::default() };
    let error = generate(&model, None, &[vec![1]], &config("x"), &bare(), |_, _| true).unwrap_err();
    assert!(matches!(&error, ModelError::Argument { what, .. } if what == "tokenizer"), "{error}");
    let error = generate(&model, Some(&tokenizer()), &[vec![1]], &config(""), &bare(), |_, _| true).unwrap_err();
    assert!(matches!(&error, ModelError::Argument { what, .. } if what == "stop"), "{error}");
}

#[test]
fn logits_that_are_not_numbers_are_an_error() {
    let model = tiny("llama", Kind::Float);
    let mut norm = model.parameter("model.norm.weight").unwrap();
    let _ = no_grad(|| norm.fill_(f64::NAN));
    for temperature in [0.0, 1.0] {
        let config = GenerateConfig { temperature, top_k: 3, ..Default::default() };
        let error = generate(&model, None, &[vec![1], vec![2]], &config, &bare(), |_, _| true).unwrap_err();
        assert!(matches!(error, ModelError::NonFinite { row: 0, position: 0, .. }), "{error}");
        assert!(error.to_string().contains("NaN") && error.hint().is_some(), "{error}");
    }
}
