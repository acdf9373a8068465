use pt_tensor::io::SafetensorsReader;
use pt_tensor::{AdamW, AdamWConfig, AdamWVariant, Device, Kind, Tensor};
use std::path::Path;

const NAMES: [&str; 5] = ["tiny", "below", "at", "ragged", "bf16"];

/// The settings of case.toml.
fn config(variant: AdamWVariant) -> AdamWConfig {
    AdamWConfig { variant, beta1: 0.9, beta2: 0.995, eps: 1e-8, weight_decay: 0.1 }
}

#[test]
fn golden_adamw8bit_is_that_of_bitsandbytes_paged_or_not() {
    // As the generator: where vectors end depends on how an operation is split.
    pt_tensor::set_num_threads(1);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/adamw8bit/decayed");
    let inputs = SafetensorsReader::open(folder.join("inputs.safetensors")).unwrap();
    let expected = SafetensorsReader::open(folder.join("expected.safetensors")).unwrap();
    for variant in [AdamWVariant::Adamw8bit, AdamWVariant::PagedAdamw8bit] {
        let input = |name: &str, part: &str| inputs.tensor(&format!("{name}.{part}"), Device::Cpu).unwrap();
        let leaves: Vec<(String, Tensor)> =
            NAMES.iter().map(|name| (name.to_string(), input(name, "start").set_requires_grad(true))).collect();
        let clones = leaves.iter().map(|(name, leaf)| (name.clone(), leaf.shallow_clone())).collect();
        let mut adam = AdamW::new(clones, config(variant)).unwrap();
        for step in 1..=6 {
            for (name, leaf) in &leaves {
                let grad = input(name, "grad").roll([step], [0i64; 0]) * (step as f64 / 2.0);
                let mut leaf = leaf.shallow_clone();
                leaf.zero_grad();
                // A leaf's gradient in this product is the other factor, exactly.
                pt_tensor::autograd::backward(&[leaf.shallow_clone()], &[grad]).unwrap();
            }
            adam.step(1e-2).unwrap();
        }
        let found = leaves.iter().map(|(name, leaf)| (name.clone(), leaf.detach()));
        let states = adam.state().into_iter().filter(|(name, _)| name != "step");
        let mut num_exact = 0;
        for (name, found) in found.chain(states) {
            let want = expected.tensor(&name, Device::Cpu).unwrap();
            assert_eq!((found.size(), found.kind()), (want.size(), want.kind()), "{name}");
            let num_other = found.not_equal_tensor(&want).sum(Kind::Int64).int64_value(&[]);
            let error = (found.to_kind(Kind::Double) - want.to_kind(Kind::Double)).abs().max().double_value(&[]);
            println!("{variant:?} {name}: {num_other} of {} differ, by at most {error:.1e}", want.numel());
            // 32-bit states come from libtorch's fused kernel, which rounds elsewhere than bitsandbytes.
            if name.starts_with("tiny") || name.starts_with("below") {
                assert!(error <= 1e-6, "{name}: {error}");
            } else {
                assert_eq!(num_other, 0, "{name}: by {error}");
                num_exact += 1;
            }
        }
        assert_eq!(num_exact, 3 * 5, "three tensors with two moments of two parts each");
    }
}
