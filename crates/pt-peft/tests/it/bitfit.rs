//! What BitFit trains, and what it says of it.

use crate::laws::{names, two_sequences};
use crate::tiny;
use pt_model::{Bare, Sites};
use pt_peft::testing::{disturb, logits};
use pt_peft::{Adapter, BitfitAdapter, BitfitConfig, PeftError};
use std::rc::Rc;

#[test]
fn a_new_adapter_is_the_base_bit_for_bit() {
    let bare: Rc<dyn Sites> = Rc::new(Bare);
    for name in ["llama", "llama_untied", "qwen2", "gpt2"] {
        let model = tiny(name);
        let sites: Rc<dyn Sites> = Rc::new(BitfitAdapter::new(BitfitConfig::default(), &model).unwrap());
        let [with, without] = [&sites, &bare].map(|sites| logits(&model, sites, &two_sequences()).unwrap());
        assert!(with.equal(&without), "{name}");
    }
}

#[test]
fn the_biases_of_the_model_are_trained_or_where_it_has_none_new_ones() {
    let trained = |name: &str| {
        let model = tiny(name);
        let adapter = BitfitAdapter::new(BitfitConfig::default(), &model).unwrap();
        (adapter.targets().map(ToString::to_string).collect::<Vec<_>>(), adapter.note().unwrap())
    };
    // Two layers: all that GPT-2 has, norms among them; three of a Qwen2's layer; seven new ones of a Llama's.
    let (of_gpt2, note) = trained("gpt2");
    assert_eq!((of_gpt2.len(), note.as_str()), (2 * 6 + 1, "BitFit trains 13 biases of the model"));
    assert!(of_gpt2.contains(&"transformer.ln_f.bias".to_string()), "{of_gpt2:?}");
    assert_eq!(trained("qwen2").0.len(), 2 * 3);
    let (of_llama, note) = trained("llama");
    assert_eq!(of_llama.len(), 2 * 7);
    assert!(note.contains("14 new biases that start at zero") && !of_llama.iter().any(|n| n.contains("lm_head")));
    let typo = BitfitConfig { target_modules: Some(names(&["q_prj"])), ..Default::default() };
    assert!(BitfitAdapter::new(typo, &tiny("llama")).unwrap_err().hint().unwrap().contains("`q_proj`"));
}

#[test]
fn two_of_them_merged_over_the_same_weights_come_out_in_reverse_order_only() {
    let mut model = tiny("llama");
    let [first, second] = [0.1, 0.2].map(|amount| {
        let adapter = BitfitAdapter::new(BitfitConfig::default(), &model).unwrap();
        disturb(&adapter, amount);
        adapter
    });
    first.merge_into(&mut model).unwrap();
    second.merge_into(&mut model).unwrap();
    assert!(matches!(first.unmerge_from(&mut model), Err(PeftError::State(_))));
    second.unmerge_from(&mut model).unwrap();
    first.unmerge_from(&mut model).unwrap();
    assert!(model.biases().is_empty());
}
