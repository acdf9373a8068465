//! Adapters made one, against PEFT's `add_weighted_adapter`.

use crate::{fixtures, sequences, tiny};
use pt_model::Sites;
use pt_peft::testing::{disturb, logits};
use pt_peft::{Combination, LoraAdapter, LoraConfig, PeftError, Pruning, Sum};
use pt_tensor::Device;
use pt_tensor::io::SafetensorsReader;
use std::rc::Rc;

#[test]
fn golden_combine_gives_the_logits_of_pefts_weighted_adapters() {
    let case = fixtures().join("combine/two_loras");
    let model = tiny("llama");
    let [first, second] = ["first", "second"].map(|name| LoraAdapter::load(&case.join(name), &model).unwrap());
    let expected = SafetensorsReader::open(case.join("expected.safetensors")).unwrap();
    let mut num_compared = 0;
    for tensor in expected.names() {
        let name = tensor.strip_prefix("logits.").unwrap();
        let mut how: Combination = name.parse().unwrap();
        if let Sum::Products { rank } = &mut how.sum {
            *rank = Some(3);
        }
        if let Some(Pruning::Magnitude { density }) = &mut how.pruning {
            *density = 0.3;
        }
        let combined = LoraAdapter::combined(&model, &[(&first, 0.7), (&second, -0.4)], how).unwrap();
        let sites: Rc<dyn Sites> = Rc::new(combined);
        let want = expected.tensor(tensor, Device::Cpu).unwrap();
        let off = (logits(&model, &sites, &sequences(&case)).unwrap() - want).abs().max().double_value(&[]);
        assert!(off < 5e-5, "{name} is off by {off:e}");
        num_compared += 1;
    }
    assert_eq!(num_compared, 7);
}

#[test]
fn what_cannot_be_combined_is_refused_by_name() {
    let model = tiny("llama");
    let lora = |config: LoraConfig| {
        let adapter = LoraAdapter::new(LoraConfig { rank: 4, ..config }, &model, 1).unwrap();
        disturb(&adapter, 0.05);
        adapter
    };
    let linear: Combination = "linear".parse().unwrap();
    let plain = lora(LoraConfig::default());
    let dora = lora(LoraConfig { use_dora: true, ..Default::default() });
    let error = LoraAdapter::combined(&model, &[(&plain, 1.0), (&dora, 1.0)], linear).unwrap_err();
    assert!(matches!(&error, PeftError::State(why) if why.contains("adapter 2 of 2 has DoRA's magnitudes")), "{error}");
    let other = LoraAdapter::new(LoraConfig { rank: 2, ..Default::default() }, &model, 1).unwrap();
    let error = LoraAdapter::combined(&model, &[(&plain, 1.0), (&other, 1.0)], linear).unwrap_err();
    assert!(error.to_string().contains("rank 2 beside one of rank 4"), "{error}");
    let error = LoraAdapter::combined(&model, &[(&plain, f64::NAN)], linear).unwrap_err();
    assert!(error.to_string().contains("the weight of adapter 1 of 1 is NaN"), "{error}");
    assert!(LoraAdapter::combined(&model, &[], linear).is_err());
}
