//! 4-bit checkpoints, both ways, against transformers with bitsandbytes.

use super::common::{cases, fixtures};
use super::{bare, max_error};
use pt_model::{
    CausalLm, Completion, LinearFormat, PackedBatch, Pretrained, PromptGroup, RunOptions, quantize_checkpoint,
};
use pt_tensor::io::SafetensorsReader;
use pt_tensor::{Device, Kind, Nf4Arithmetic, Nf4Options, Tensor, no_grad};
use std::path::Path;

/// Logits of the case's sequences, each run alone.
fn logits(model: &CausalLm, case: &Path) -> Tensor {
    let inputs = SafetensorsReader::open(case.join("inputs.safetensors")).unwrap();
    let read = |name: &str| Vec::<i64>::try_from(inputs.tensor(name, Device::Cpu).unwrap()).unwrap();
    let (ids, mut start) = (read("input_ids"), 0);
    let groups: Vec<PromptGroup> = read("lengths")
        .into_iter()
        .map(|length| {
            let row = ids[start..start + length as usize].to_vec();
            start += row.len();
            PromptGroup::single(vec![], Completion::new(row))
        })
        .collect();
    let batch = PackedBatch::new(&groups, Device::Cpu).unwrap();
    no_grad(|| {
        let hidden_states = model.hidden_states(&batch, &bare(), RunOptions::default()).unwrap();
        model.logits(&hidden_states, bare().as_ref()).unwrap()
    })
}

fn uses_double_quant(pretrained: &Pretrained) -> bool {
    pretrained.config.raw["quantization_config"]["bnb_4bit_use_double_quant"].as_bool().unwrap()
}

#[test]
fn golden_models_nf4_checkpoints_of_bitsandbytes_give_its_logits() {
    for case in cases("models_nf4") {
        let expected = SafetensorsReader::open(case.join("expected.safetensors")).unwrap();
        let expected = expected.tensor("logits", Device::Cpu).unwrap();
        let stored = Pretrained::open(case.join("model")).unwrap();
        let model = CausalLm::load(&stored, Device::Cpu, Kind::Float).unwrap();
        assert!(model.linear_layers().any(|layer| layer.weight.as_nf4().is_some()), "it stays in 4 bits");
        let error = max_error(&logits(&model, &case), &expected);
        assert!(error <= 5e-5, "{}: {error}", case.display());
        // Quantized while loading; the scales of double quantization may differ in the last place.
        let options = Nf4Options { double_quant: uses_double_quant(&stored), ..Nf4Options::default() };
        let dense = Pretrained::open(case.join("dense")).unwrap();
        let format = LinearFormat::Nf4 { options, arithmetic: Nf4Arithmetic::Exact, with_output: false };
        let model = CausalLm::load_with(&dense, Device::Cpu, Kind::Float, format).unwrap();
        let error = max_error(&logits(&model, &case), &expected);
        assert!(error <= if options.double_quant { 2e-2 } else { 5e-5 }, "{}: {error}", case.display());
    }
}

#[test]
fn codes_and_scales_are_the_same_whatever_products_are_computed_in() {
    // Weights that bf16 would round.
    for name in ["llama", "llama_untied", "gpt2"] {
        let dense = Pretrained::open(fixtures("models").join(name).join("model")).unwrap();
        let tensors = |kind, with_output| {
            let (options, arithmetic) = (Nf4Options::default(), Nf4Arithmetic::Exact);
            let format = LinearFormat::Nf4 { options, arithmetic, with_output };
            let model = CausalLm::load_with(&dense, Device::Cpu, kind, format).unwrap();
            assert!(model.linear_layers().all(|layer| layer.weight.kind() == kind));
            let of_layer = |layer: &pt_model::Linear| {
                layer.weight.as_nf4().map(|nf4| nf4.tensors(&format!("{}.weight", layer.path)).unwrap())
            };
            let mut all: Vec<(String, Tensor)> = model.linear_layers().filter_map(of_layer).flatten().collect();
            // The description names the kind.
            all.retain(|(name, _)| !name.contains(".quant_state."));
            all
        };
        for with_output in [false, true] {
            let (narrow, wide) = (tensors(Kind::BFloat16, with_output), tensors(Kind::Float, with_output));
            assert_eq!(narrow.iter().any(|(name, _)| name == "lm_head.weight"), with_output, "{name}");
            assert!(narrow == wide, "{name}");
        }
        // A checkpoint that is quantized to compute in bf16 holds them too.
        let (saved, _) = quantize_checkpoint(&dense, Kind::BFloat16, Nf4Options::default(), |_, _| ()).unwrap();
        for (path, tensor) in tensors(Kind::Float, false) {
            assert!(saved.iter().any(|(name, saved)| *name == path && *saved == tensor), "{name}: {path}");
        }
    }
}

#[test]
fn golden_models_nf4_a_quantized_checkpoint_has_the_tensors_of_bitsandbytes() {
    for case in cases("models_nf4") {
        let dense = Pretrained::open(case.join("dense")).unwrap();
        let theirs = Pretrained::open(case.join("model")).unwrap();
        let double_quant = uses_double_quant(&theirs);
        let options = Nf4Options { double_quant, ..Nf4Options::default() };
        let (tensors, config) = quantize_checkpoint(&dense, Kind::Float, options, |_, _| ()).unwrap();
        for (key, value) in config["quantization_config"].as_object().unwrap() {
            let known = &theirs.config.raw["quantization_config"][key];
            assert!(value == known || key == "llm_int8_skip_modules", "{key}: {value} is not {known}");
        }
        let reader = SafetensorsReader::open(case.join("model")).unwrap();
        let names: Vec<&str> = reader.names().collect();
        let mut ours: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
        ours.sort_unstable();
        assert_eq!(ours, names, "{}", case.display());
        for (name, tensor) in &tensors {
            let want = reader.tensor(name, Device::Cpu).unwrap();
            assert_eq!((tensor.kind(), tensor.size()), (want.kind(), want.size()), "{name}");
            if name.contains(".quant_state.") {
                let text = |tensor: &Tensor| String::from_utf8(Vec::<u8>::try_from(tensor).unwrap()).unwrap();
                let json = |tensor: &Tensor| serde_json::from_str::<serde_json::Value>(&text(tensor)).unwrap();
                let (mut ours, mut theirs) = (json(tensor), json(&want));
                if double_quant {
                    let offset = |state: &mut serde_json::Value| state["nested_offset"].take().as_f64().unwrap();
                    let (a, b) = (offset(&mut ours), offset(&mut theirs));
                    assert!((a - b).abs() <= 1e-6 * b.abs(), "{name}: {a} and {b}");
                    assert_eq!(ours, theirs);
                } else {
                    assert_eq!(text(tensor), text(&want), "{name}");
                }
            } else if name.ends_with("absmax") && double_quant {
                // bitsandbytes' CPU library finds the 8-bit codes through a coarse table and adds the mean up in another order.
                assert!(max_error(tensor, &want) <= 4.0, "{name}");
            } else {
                assert_eq!(*tensor, want, "{name}");
            }
        }
        let again = quantize_checkpoint(&theirs, Kind::Float, options, |_, _| ()).unwrap_err();
        assert!(again.to_string().contains("in 4 bits already"), "{again}");
    }
}
