use super::{bare, max_error, tiny};
use pt_model::{
    CausalLm, Completion, GenerateConfig, ModelError, PackedBatch, PromptGroup, RunOptions, Sites, generate,
};
use pt_tensor::{Device, Kind, LabelLogprobs, Tensor};
use std::rc::Rc;

const CASES: [&str; 5] = ["llama", "llama_untied", "mistral_sliding", "qwen2", "gpt2"];

fn logprobs(model: &CausalLm, groups: &[PromptGroup], options: RunOptions) -> Tensor {
    let batch = PackedBatch::new(groups, Device::Cpu).unwrap();
    model.label_logprobs(&batch, &bare(), options, &LabelLogprobs::default()).unwrap().logprobs
}

fn rows() -> Vec<PromptGroup> {
    let row =
        |prompt: &[i64], completion: &[i64]| PromptGroup::single(prompt.to_vec(), Completion::new(completion.to_vec()));
    vec![
        row(&[5, 9, 14, 3], &[7, 8, 2]),
        row(&[11], &[3, 4, 5, 6, 7, 8, 9, 10]),
        row(&[1, 2, 3, 4, 5, 6, 7], &[20, 21]),
    ]
}

/// Gradient of the summed log-probs with respect to every weight.
fn gradients(case: &str, groups: &[PromptGroup], options: RunOptions) -> Vec<(String, Tensor)> {
    let mut model = tiny(case, Kind::Double);
    let leaves = model.train_all().unwrap();
    logprobs(&model, groups, options).sum(Kind::Double).backward();
    leaves.into_iter().map(|(name, leaf)| (name, leaf.grad())).filter(|(_, grad)| grad.defined()).collect()
}

fn assert_equal_gradients(case: &str, a: &[(String, Tensor)], b: &[(String, Tensor)]) {
    assert_eq!(a.len(), b.len());
    for ((name, left), (_, right)) in a.iter().zip(b) {
        assert!(max_error(left, right) < 1e-9, "{case}: {name}: {}", max_error(left, right));
    }
}

#[test]
fn packed_rows_score_as_rows_alone() {
    for case in CASES {
        let model = tiny(case, Kind::Double);
        let packed = logprobs(&model, &rows(), RunOptions::default());
        let alone: Vec<Tensor> =
            rows().into_iter().map(|row| logprobs(&model, &[row], RunOptions::default())).collect();
        assert!(max_error(&packed, &Tensor::cat(&alone, 0)) < 1e-12, "{case}");
    }
}

#[test]
fn the_order_of_rows_changes_nothing() {
    for case in CASES {
        let model = tiny(case, Kind::Double);
        let mut reversed = rows();
        reversed.reverse();
        let forward = logprobs(&model, &rows(), RunOptions::default());
        let parts = logprobs(&model, &reversed, RunOptions::default()).split_with_sizes([2, 8, 3], 0);
        let back = Tensor::cat(&[&parts[2], &parts[1], &parts[0]], 0);
        assert!(max_error(&forward, &back) < 1e-12, "{case}");
    }
}

#[test]
fn a_shared_prompt_equals_a_repeated_one_in_values_and_gradients() {
    let prompt = vec![5, 9, 14, 3, 22];
    let completions = [vec![7, 8, 2], vec![4], vec![30, 31, 32, 33, 34, 35]];
    let shared = vec![PromptGroup {
        prompt: prompt.clone(),
        completions: completions.iter().map(|ids| Completion::new(ids.clone())).collect(),
    }];
    let repeated: Vec<PromptGroup> =
        completions.iter().map(|ids| PromptGroup::single(prompt.clone(), Completion::new(ids.clone()))).collect();
    for case in CASES {
        let model = tiny(case, Kind::Double);
        let options = RunOptions::default();
        assert!(
            max_error(&logprobs(&model, &shared, options), &logprobs(&model, &repeated, options)) < 1e-12,
            "{case}"
        );
        assert_equal_gradients(case, &gradients(case, &shared, options), &gradients(case, &repeated, options));
    }
}

#[test]
fn activation_checkpointing_changes_no_gradient() {
    for case in CASES {
        let plain = gradients(case, &rows(), RunOptions::default());
        let checkpointed = gradients(case, &rows(), RunOptions { is_checkpointed: true });
        let names = |all: &[(String, Tensor)]| all.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&checkpointed), names(&plain), "{case}");
        assert_eq!(plain.len(), tiny(case, Kind::Double).named_parameters().unwrap().len(), "{case}");
        assert_equal_gradients(case, &checkpointed, &plain);
    }
}

#[test]
fn decoding_with_a_cache_equals_running_the_whole_sequence() {
    for case in CASES {
        let model = tiny(case, Kind::Double);
        let prompts = vec![vec![5, 9, 14], vec![11], vec![1, 2, 3, 4, 5, 6, 7, 8, 9]];
        let config = GenerateConfig { max_new_tokens: 12, with_logprobs: true, ..Default::default() };
        let rows = generate(&model, None, &prompts, &config, &bare(), |_, _| true).unwrap();
        for (prompt, row) in prompts.iter().zip(&rows) {
            assert_eq!(row.token_ids.len(), 12);
            let group = PromptGroup::single(prompt.clone(), Completion::new(row.token_ids.clone()));
            let batch = PackedBatch::new(&[group], Device::Cpu).unwrap();
            let out = model.label_logprobs(&batch, &bare(), RunOptions::default(), &LabelLogprobs::default()).unwrap();
            let own = Tensor::from_slice(row.logprobs.as_deref().unwrap());
            assert!(max_error(&own, &out.logprobs) < 1e-5, "{case}");
            // Greedy: every token is the most probable one.
            assert_eq!(out.is_top1.sum(Kind::Double).double_value(&[]), 12.0, "{case}");
        }
    }
}

#[test]
fn samples_of_a_prompt_do_not_depend_on_the_batch() {
    let model = tiny("llama", Kind::Double);
    let config = GenerateConfig {
        max_new_tokens: 8,
        temperature: 1.0,
        top_p: 0.9,
        seed: 7,
        num_samples: 3,
        ..Default::default()
    };
    let alone = generate(&model, None, &[vec![5, 9]], &config, &bare(), |_, _| true).unwrap();
    let batched = generate(&model, None, &[vec![5, 9], vec![3, 4, 5, 6]], &config, &bare(), |_, _| true).unwrap();
    assert_eq!(alone, batched[..3]);
    let second = GenerateConfig { first_prompt: 1, ..config.clone() };
    assert_eq!(generate(&model, None, &[vec![3, 4, 5, 6]], &second, &bare(), |_, _| true).unwrap(), batched[3..]);
    assert_ne!(alone[0], alone[1]);
}

#[test]
fn a_prompt_without_room_to_answer_is_refused() {
    let model = tiny("llama", Kind::Float);
    let context = model.config().max_position_embeddings as usize;
    let error =
        generate(&model, None, &[vec![1; context]], &GenerateConfig::default(), &bare(), |_, _| true).unwrap_err();
    assert!(error.to_string().contains(&format!("longer than the context of {context}")), "{error}");
    assert!(error.hint().is_some());
}

#[test]
fn a_sequence_past_the_context_is_refused() {
    for case in CASES {
        let model = tiny(case, Kind::Float);
        let context = model.config().max_position_embeddings as usize;
        let batch = |length: usize| {
            let group = PromptGroup::single(vec![1; 2], Completion::new(vec![1; length - 2]));
            PackedBatch::new(&[group], Device::Cpu).unwrap()
        };
        let run = |length| model.hidden_states(&batch(length), &bare(), RunOptions::default());
        assert_eq!(run(context).unwrap().size()[0], context as i64);
        let error = run(context + 1).unwrap_err();
        let is_named =
            matches!(error, ModelError::TooLong { length, context: c, .. } if length == c + 1 && c == context);
        assert!(is_named, "{case}: {error}");
    }
}

/// A method that fails at one kind of site.
#[derive(Debug)]
struct Failing;

impl Sites for Failing {
    fn gap(&self, _site: &pt_model::GapSite<'_>, _hidden_states: Tensor) -> pt_model::Result<Tensor> {
        Err(ModelError::TooLong { length: 9, virtual_tokens: 0, context: 8 })
    }
}

#[test]
fn an_error_inside_a_checkpointed_layer_stays_itself() {
    let model = tiny("llama", Kind::Float);
    let batch = PackedBatch::new(&rows(), Device::Cpu).unwrap();
    let sites: Rc<dyn Sites> = Rc::new(Failing);
    for is_checkpointed in [false, true] {
        let error = model.hidden_states(&batch, &sites, RunOptions { is_checkpointed }).unwrap_err();
        assert!(matches!(error, ModelError::TooLong { length: 9, context: 8, .. }), "{error:?}");
        assert!(error.hint().is_some());
    }
}
