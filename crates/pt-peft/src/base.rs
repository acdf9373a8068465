//! What an adapter goes on.

use crate::Result;
use pt_model::{Architecture, CausalLm, Linear};
use pt_tensor::{Device, Kind, Tensor, no_grad};

/// The frozen side of an adapter: a [`CausalLm`], or linear layers of a model of one's own (a slice of [`Linear`], each
/// with an index of its own), made with `into()`.
#[derive(Debug)]
pub struct Base<'a> {
    pub(crate) layers: Vec<&'a Linear>,
    /// Position of the output layer, which `all-linear` leaves out.
    pub(crate) output: Option<usize>,
    /// The input embedding of a model.
    pub(crate) embedding: Option<Embedding>,
    /// Whether the output layer is the embedding too.
    pub(crate) is_output_tied: bool,
    model: Option<&'a CausalLm>,
}

/// Module path of a decoder layer: `model.layers.0`.
pub(crate) fn layer_path(model: &CausalLm, layer: usize) -> String {
    let stem = if model.config().architecture == Architecture::Gpt2 { "transformer.h" } else { "model.layers" };
    format!("{stem}.{layer}")
}

/// A model's input embedding.
#[derive(Debug)]
pub(crate) struct Embedding {
    /// Its module's path: `model.embed_tokens`.
    pub(crate) path: String,
    /// `[vocab_size, hidden_size]`, the model's own.
    pub(crate) table: Tensor,
}

impl<'a> From<&'a CausalLm> for Base<'a> {
    fn from(model: &'a CausalLm) -> Self {
        let layers: Vec<&Linear> = model.linear_layers().collect();
        // By the model's contract the output layer is the last.
        let (path, table) = model.embedding();
        let embedding = Some(Embedding { path: path.into(), table: table.shallow_clone() });
        let is_output_tied = model.config().tie_word_embeddings;
        Self { output: layers.len().checked_sub(1), layers, embedding, is_output_tied, model: Some(model) }
    }
}

impl<'a> From<&'a [Linear]> for Base<'a> {
    fn from(layers: &'a [Linear]) -> Self {
        Self { layers: layers.iter().collect(), output: None, embedding: None, is_output_tied: false, model: None }
    }
}

impl Base<'_> {
    /// The family of the model; none of layers alone.
    pub(crate) fn architecture(&self) -> Option<Architecture> {
        self.model.map(|model| model.config().architecture)
    }

    /// What the model computes in.
    pub(crate) fn kind(&self) -> Kind {
        let of_layers = || self.layers.first().map_or(Kind::Float, |layer| layer.weight.kind());
        self.model.map_or_else(of_layers, CausalLm::kind)
    }

    /// Where the model is.
    pub(crate) fn device(&self) -> Device {
        let of_layers = || self.layers.first().map_or(Device::Cpu, |layer| layer.weight.device());
        self.model.map_or_else(of_layers, CausalLm::device)
    }

    /// Whether it is a model of ours, with parameters outside its layers.
    pub(crate) fn is_model(&self) -> bool {
        self.model.is_some()
    }

    /// Embeddings and norms by name; of layers alone, none.
    pub(crate) fn plain_parameters(&self) -> Vec<(String, Tensor)> {
        self.model.map_or(vec![], CausalLm::plain_parameters)
    }

    /// The names of the embedding and of the output weight that is the same tensor, where they are tied.
    pub(crate) fn tied_output(&self) -> Option<(String, String)> {
        let embedding = self.embedding.as_ref().filter(|_| self.is_output_tied)?;
        let output = self.output.map(|position| format!("{}.weight", self.layers[position].path))?;
        Some((format!("{}.weight", embedding.path), output))
    }

    /// Every bias by its name.
    pub(crate) fn biases(&self) -> Vec<(String, Tensor)> {
        let of_layer = |layer: &&Linear| Some((format!("{}.bias", layer.path), layer.bias.as_ref()?.shallow_clone()));
        self.model.map_or_else(|| self.layers.iter().filter_map(of_layer).collect(), CausalLm::biases)
    }

    /// A parameter by its name.
    pub(crate) fn parameter(&self, name: &str) -> Result<Option<Tensor>> {
        if let Some(model) = self.model {
            return Ok(model.parameter(name));
        }
        let Some((module, part)) = name.rsplit_once('.') else { return Ok(None) };
        let Some(layer) = self.layers.iter().find(|layer| layer.path == module) else { return Ok(None) };
        Ok(match part {
            "weight" => Some(layer.weight.dense()?),
            "bias" => layer.bias.as_ref().map(Tensor::shallow_clone),
            _ => None,
        })
    }

    /// Whether a value is that of the parameter of this name.
    pub(crate) fn has_equal(&self, name: &str, shape: &[i64], value: impl FnOnce() -> Result<Tensor>) -> Result<bool> {
        match self.parameter(name)? {
            Some(own) if own.size() == shape => {
                let value = value()?.to_device(own.device()).to_kind(own.kind());
                Ok(no_grad(|| value.equal(&own)))
            }
            _ => Ok(false),
        }
    }
}
