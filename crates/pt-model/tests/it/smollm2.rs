use super::{bare, fixtures};
use pt_model::{CausalLm, Completion, GenerateConfig, PackedBatch, Pretrained, PromptGroup, RunOptions, generate};
use pt_tensor::{Device, Kind, LabelLogprobs, no_grad};
use serde_json::Value;

fn ids(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

/// The file that `cargo xtask fetch smollm2-135m-instruct` puts into the cache.
fn real_model() -> Pretrained {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(std::path::PathBuf::from);
    let cache = cache.unwrap_or_else(|| std::path::PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache"));
    let path = cache.join("pt/models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is not there: run `cargo xtask fetch smollm2-135m-instruct` first", path.display());
    Pretrained::open(path).unwrap()
}

#[test]
fn golden_smollm2_greedy_tokens_and_logprobs_equal_those_of_transformers() {
    let text = std::fs::read(fixtures().join("smollm2/answers/expected.json")).unwrap();
    let expected: Value = serde_json::from_slice(&text).unwrap();
    let pretrained = real_model();
    let model = CausalLm::load(&pretrained, Device::Cpu, Kind::Float).unwrap();
    let tokenizer = pretrained.tokenizer.as_ref().unwrap();

    let cases = expected["greedy"].as_array().unwrap();
    assert_eq!(cases.len(), 8);
    for case in cases {
        assert_eq!(tokenizer.encode(case["prompt"].as_str().unwrap()).unwrap(), ids(&case["prompt_ids"]));
    }
    let prompts: Vec<Vec<i64>> = cases.iter().map(|case| ids(&case["prompt_ids"])).collect();
    let config = GenerateConfig {
        max_new_tokens: expected["max_new_tokens"].as_u64().unwrap() as usize,
        stop_ids: vec![expected["stop_id"].as_i64().unwrap()],
        ..Default::default()
    };
    let rows = generate(&model, None, &prompts, &config, &bare(), |_, _| true).unwrap();
    for (case, row) in cases.iter().zip(rows) {
        assert_eq!(row.token_ids, ids(&case["new_ids"]), "{}", case["prompt"]);
    }

    let cases = expected["scored"].as_array().unwrap();
    assert_eq!(cases.len(), 8);
    let groups: Vec<PromptGroup> = cases
        .iter()
        .map(|case| PromptGroup::single(ids(&case["prompt_ids"]), Completion::new(ids(&case["completion_ids"]))))
        .collect();
    let batch = PackedBatch::new(&groups, Device::Cpu).unwrap();
    let out =
        no_grad(|| model.label_logprobs(&batch, &bare(), RunOptions::default(), &LabelLogprobs::default())).unwrap();
    let sums = Vec::<f32>::try_from(batch.sum_by_completion(&out.logprobs)).unwrap();
    for (case, sum) in cases.iter().zip(sums) {
        let want = case["logprob_sum"].as_f64().unwrap();
        assert!((f64::from(sum) - want).abs() <= 1e-3, "{sum} and {want}");
    }
}
