use super::{bare, fixtures, max_error, tiny};
use pt_model::{Completion, PackedBatch, PromptGroup, RunOptions};
use pt_tensor::io::SafetensorsReader;
use pt_tensor::{Device, Kind, no_grad};

#[test]
fn golden_models_logits_of_a_ragged_batch_equal_those_of_transformers() {
    let mut cases = 0;
    for entry in std::fs::read_dir(fixtures().join("models")).unwrap() {
        let folder = entry.unwrap().path();
        let case = folder.file_name().unwrap().to_str().unwrap().to_string();
        let model = tiny(&case, Kind::Float);
        let inputs = SafetensorsReader::open(folder.join("inputs.safetensors")).unwrap();
        let expected = SafetensorsReader::open(folder.join("expected.safetensors")).unwrap();
        let ids = Vec::<i64>::try_from(inputs.tensor("input_ids", Device::Cpu).unwrap()).unwrap();
        let lengths = Vec::<i64>::try_from(inputs.tensor("lengths", Device::Cpu).unwrap()).unwrap();
        let mut rest = ids.as_slice();
        let groups: Vec<PromptGroup> = lengths
            .iter()
            .map(|&len| {
                let (row, tail) = rest.split_at(len as usize);
                rest = tail;
                PromptGroup::single(vec![], Completion::new(row.to_vec()))
            })
            .collect();
        let batch = PackedBatch::new(&groups, Device::Cpu).unwrap();
        let sites = bare();
        let logits = no_grad(|| {
            let hidden_states = model.hidden_states(&batch, &sites, RunOptions::default()).unwrap();
            model.logits(&hidden_states, sites.as_ref()).unwrap()
        });
        let error = max_error(&logits, &expected.tensor("logits", Device::Cpu).unwrap());
        assert!(error <= 2e-5, "{case}: {error}");
        cases += 1;
    }
    assert!(cases >= 6, "only {cases} cases found");
}
