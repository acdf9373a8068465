//! Distillation against BitDelta's code path in torch, and its equalities.

use pt_model::{Bare, CausalLm, Pretrained, Sites};
use pt_peft::{Adapter, BitDeltaAdapter, BitDeltaConfig, FineTuned, StoredDelta, compress};
use pt_tensor::io::SafetensorsReader;
use pt_tensor::{Device, Kind, Tensor};
use pt_train::distill::{DistillConfig, LogitsError, Role, distill};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

fn load(path: &Path) -> (Pretrained, CausalLm) {
    let pretrained = Pretrained::open(path).unwrap();
    let model = CausalLm::load(&pretrained, Device::Cpu, Kind::Float).unwrap();
    (pretrained, model)
}

fn bare(model: &CausalLm) -> Role<'_> {
    Role { model, sites: Rc::new(Bare) }
}

#[test]
fn golden_bitdelta_scales_after_distillation_are_those_of_its_script() {
    for name in ["llama", "llama_untied"] {
        let case = fixtures().join("bitdelta").join(name);
        let (pretrained, base) = load(&fixtures().join("models").join(name).join("model"));
        let (_, tuned) = load(&case.join("fine_tuned"));
        let original = case.join("original.safetensors");
        let delta = StoredDelta::import(&original, &pretrained, BitDeltaConfig::default(), |_, _| ()).unwrap();
        let adapter = Rc::new(BitDeltaAdapter::new(delta, &base).unwrap());
        let student = Role { model: &base, sites: adapter.clone() };
        let pieces = SafetensorsReader::open(case.join("inputs.safetensors")).unwrap();
        let pieces = Vec::<Vec<i64>>::try_from(pieces.tensor("pieces", Device::Cpu).unwrap()).unwrap();

        let config = DistillConfig { steps: 3, learning_rate: Some(1e-3), ..DistillConfig::default() };
        let mut losses = Vec::new();
        let stop = AtomicBool::new(false);
        let watch = |record: pt_train::distill::DistillRecord| losses.push(record.loss);
        let steps = distill(&student, adapter.parameters(), &bare(&tuned), &pieces, &config, &stop, watch).unwrap();
        assert_eq!(steps, 3);
        let expected = SafetensorsReader::open(case.join("expected.safetensors")).unwrap();
        let want = Vec::<f32>::try_from(expected.tensor("losses", Device::Cpu).unwrap()).unwrap();
        for (loss, want) in losses.iter().zip(&want) {
            assert!((loss - f64::from(*want)).abs() <= 1e-5, "{name}: loss {loss}, expected {want}");
        }
        for (key, scale) in adapter.parameters() {
            let key = format!("coeff.{}", key.trim_end_matches(".scale"));
            let want = expected.tensor(&key, Device::Cpu).unwrap().double_value(&[]);
            let off = (scale.double_value(&[0]) - want).abs();
            assert!(off <= 1e-5, "{name}: {key} is off by {off:e}");
        }
    }
}

#[test]
fn the_error_without_logits_is_that_of_the_logits() {
    // One output weight, and two.
    for name in ["llama", "llama_untied"] {
        let case = fixtures().join("bitdelta").join(name);
        let (_, base) = load(&fixtures().join("models").join(name).join("model"));
        let (_, tuned) = load(&case.join("fine_tuned"));
        let pieces = vec![vec![1, 5, 9, 77, 3], vec![40, 2]];
        let logits = |model: &CausalLm| {
            let sites: Rc<dyn Sites> = Rc::new(Bare);
            pt_peft::testing::logits(model, &sites, &pieces).unwrap().to_kind(Kind::Double)
        };
        let want = (logits(&base) - logits(&tuned)).square().mean(Kind::Double).double_value(&[]);
        let error = LogitsError::new(&bare(&base), &bare(&tuned)).unwrap();
        let found = error.mean(&bare(&base), &bare(&tuned), &pieces).unwrap();
        assert!((found - want).abs() < 1e-5 * want, "{name}: {found}, expected {want}");
        let same = LogitsError::new(&bare(&base), &bare(&base)).unwrap();
        assert_eq!(same.mean(&bare(&base), &bare(&base), &pieces).unwrap(), 0.0);
    }
}

#[test]
fn an_adapter_over_the_student_s_own_base_can_teach() {
    let folder = tempfile::tempdir().unwrap();
    let path = fixtures().join("models/llama/model");
    let (pretrained, base) = load(&path);
    let plain = fixtures().join("lora/plain/adapter");
    let teacher = pt_peft::load_adapter(&plain, &base).unwrap();
    let (_, mut merged) = load(&path);
    pt_peft::load_adapter(&plain, &merged).unwrap().merge_into(&mut merged).unwrap();
    let config = BitDeltaConfig::default();
    let delta = compress(&pretrained, FineTuned::Model(&merged), config, Kind::Float, |_, _| ()).unwrap();
    delta.save(&folder.path().join("delta")).unwrap();
    let adapter = Rc::new(BitDeltaAdapter::new(delta, &base).unwrap());
    let [student, teacher] = [adapter.clone() as Rc<dyn Sites>, teacher].map(|sites| Role { model: &base, sites });
    let pieces: Vec<Vec<i64>> =
        (0..8).map(|seed| (0..12).map(|at| (seed * 37 + at * 11 + 3) % 128).collect()).collect();
    let error = LogitsError::new(&student, &teacher).unwrap();
    let before = error.mean(&student, &teacher, &pieces).unwrap();
    let config = DistillConfig { steps: 60, learning_rate: Some(2e-3), ..DistillConfig::default() };
    let stop = AtomicBool::new(false);
    distill(&student, adapter.parameters(), &teacher, &pieces, &config, &stop, |_| ()).unwrap();
    let after = error.mean(&student, &teacher, &pieces).unwrap();
    assert!(after < 0.95 * before, "{before} to {after}");
    // Nothing but the scales has moved, and a stop is heeded.
    let loaded = StoredDelta::load(&folder.path().join("delta")).unwrap();
    let trained = adapter.to_stored().unwrap();
    for (path, signs) in loaded.signs() {
        let (_, now) = trained.signs().find(|(other, _)| *other == path).unwrap();
        assert!(now.signs().unwrap().equal(&signs.signs().unwrap()), "{path}");
        assert!(!now.scale().equal(signs.scale()), "{path}");
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let scales = || adapter.parameters().into_iter().map(|(_, t)| t.detach().copy()).collect::<Vec<Tensor>>();
    let kept = scales();
    assert_eq!(distill(&student, adapter.parameters(), &teacher, &pieces, &config, &stop, |_| ()).unwrap(), 0);
    assert!(kept.iter().zip(scales()).all(|(a, b)| a.equal(&b)));
}
