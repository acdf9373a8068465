use crate::common::fixtures;
use pt_model::gguf::Gguf;
use pt_model::{Pretrained, Tokenizer};
use pt_train::Origin;
use pt_train::data::{Encode, Row, RowContent, Text, TrainTurns, row_to_group};
use pt_train::encoder::ModelEncoder;

/// The tiny Llama with a tokenizer whose configuration says whether text gets a begin token.
fn opened(adds_bos: bool) -> (tempfile::TempDir, Pretrained) {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(fixtures("models/llama/model").join(name), folder.path().join(name)).unwrap();
    }
    let vocab = fixtures("tokenizer/smollm/vocab.gguf");
    let tokenizer = Tokenizer::from_gguf(&vocab, Gguf::open(&vocab).unwrap().metadata()).unwrap().unwrap();
    tokenizer.save(folder.path()).unwrap();
    let config = serde_json::json!({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": adds_bos});
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let pretrained = Pretrained::open(folder.path()).unwrap();
    (folder, pretrained)
}

#[test]
fn plain_rows_begin_as_the_models_tokenizer_has_it() {
    for (adds_bos, begin) in [(true, &[1][..]), (false, &[])] {
        let (_folder, pretrained) = opened(adds_bos);
        let encoder = ModelEncoder::new(&pretrained).unwrap();
        let text = "two words";
        let expected = [begin, &encoder.encode(text).unwrap()].concat();
        assert_eq!(encoder.encode_plain(text).unwrap(), expected);
        let [prompt, completion] = ["two", " words"].map(|part| Text::Plain(part.into()));
        for content in [RowContent::Text(text.into()), RowContent::Completion { prompt, completion, tools: None }] {
            let origin = Origin { path: "rows.jsonl".into(), position: 1, is_line: true };
            let row = Row { content, origin, source: "rows".into(), adapter: None };
            let group = row_to_group(&row, &encoder, TrainTurns::All).unwrap();
            let ids = [group.prompt.as_slice(), &group.completions[0].token_ids].concat();
            assert_eq!(ids, [expected.as_slice(), &encoder.stop_ids()[..1]].concat());
        }
    }
}
