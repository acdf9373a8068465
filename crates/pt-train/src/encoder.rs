//! A model's tokenizer and chat template as the data code asks for them.

use crate::data::{Encode, Message};
use pt_model::{ChatTemplate, Pretrained, Tokenizer};
use serde_json::Value;

/// A tokenizer with its chat template and the ids that end a turn.
pub struct ModelEncoder<'a> {
    /// The tokenizer.
    pub tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    stop_ids: Vec<i64>,
}

impl<'a> ModelEncoder<'a> {
    /// Takes tokenizer, template and stop ids of a checkpoint; `None` when it carries no tokenizer.
    pub fn new(pretrained: &'a Pretrained) -> Option<Self> {
        let tokenizer = pretrained.tokenizer.as_ref()?;
        let mut stop_ids = tokenizer.eos_ids.clone();
        for id in &pretrained.config.eos_token_ids {
            if !stop_ids.contains(id) {
                stop_ids.push(*id);
            }
        }
        Some(Self { tokenizer, template: pretrained.chat_template.as_ref(), stop_ids })
    }

    /// Whether conversations can be rendered.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }
}

impl Encode for ModelEncoder<'_> {
    fn encode(&self, text: &str) -> Result<Vec<i64>, String> {
        self.tokenizer.encode(text).map_err(|e| e.to_string())
    }

    fn decode(&self, token_ids: &[i64]) -> String {
        self.tokenizer.decode(token_ids, false).unwrap_or_default()
    }

    fn render(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String, String> {
        let template = self.template.ok_or("the model carries no chat template")?;
        template.render(messages, tools, add_generation_prompt).map_err(|e| e.to_string())
    }

    fn stop_ids(&self) -> &[i64] {
        &self.stop_ids
    }

    fn bos_id(&self) -> Option<i64> {
        self.tokenizer.bos_to_add()
    }
}
