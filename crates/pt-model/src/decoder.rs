//! Decoder language models: one forward pass for training, scoring and generation.
//!
//! A layer does not know where its keys come from: it hands queries, keys and values to an [`Attend`], which is
//! either the plan of a packed batch or a key/value cache.

use crate::batch::PackedBatch;
use crate::config::{Activation, Architecture, ModelConfig};
use crate::load::{Pretrained, TensorSource};
use crate::rope::Rope;
use crate::sites::{Branch, BranchSite, GapSite, Linear, Past, Sites, TokenOrder, Tokens, VirtualTokens};
use crate::{ModelError, Result};
use pt_tensor::{
    AttentionPlan, DenseWeight, Device, Kind, LabelLogprobs, LabelOutput, Nf4Arithmetic, Nf4Options, Nf4Weight, Tensor,
    TensorError, Weight, packed_attention,
};
use std::cell::{OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

/// Where attention finds its keys and values.
pub(crate) trait Attend: Tokens {
    /// `query: [tokens, num_heads, head_dim]`, `key`, `value`: `[tokens, num_kv_heads, head_dim]` of layer `layer`,
    /// rotated; returns query's shape. Virtual tokens that are given as keys and values stand before the others there,
    /// and have no query.
    fn attend(&self, layer: usize, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor>;
}

struct Packed {
    plan: Arc<AttentionPlan>,
    scale: f64,
    window: Option<i64>,
    order: OnceCell<Rc<TokenOrder>>,
}

impl Tokens for Packed {
    fn past(&self, _layer: usize, input: &Tensor, _reach: usize) -> Result<Past> {
        let order = self.order.get_or_init(|| Rc::new(TokenOrder::of(&self.plan))).clone();
        Ok(Past { rows: input.shallow_clone(), order })
    }
}

impl Attend for Packed {
    fn attend(&self, _layer: usize, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        Ok(packed_attention(query, key, value, &self.plan, self.scale, self.window)?)
    }
}

/// A normalisation and the path of its parameters.
#[derive(Debug)]
struct Norm {
    path: String,
    weight: Tensor,
    /// Layer norm where there is a bias, RMS norm where there is none.
    bias: Option<Tensor>,
    eps: f64,
}

impl Norm {
    fn forward(&self, hidden_states: &Tensor, sites: &dyn Sites) -> Result<Tensor> {
        let replaced = sites.parameter(&format!("{}.weight", self.path));
        let weight = replaced.as_ref().unwrap_or(&self.weight);
        let replaced = self.bias.as_ref().and_then(|_| sites.parameter(&format!("{}.bias", self.path)));
        sites.check()?;
        let Some(bias) = &self.bias else { return Ok(pt_tensor::rms_norm(hidden_states, weight, self.eps)?) };
        let bias = replaced.as_ref().unwrap_or(bias);
        Ok(hidden_states.f_layer_norm(weight.size(), Some(weight), Some(bias), self.eps, false)?)
    }
}

/// The projections of attention: apart (Llama) or in one matrix (GPT-2).
#[derive(Debug)]
enum Qkv {
    Separate(Box<[Linear; 3]>),
    Joint(Box<Linear>),
}

/// The feed-forward network.
#[derive(Debug)]
enum Mlp {
    /// down(f(gate(x)) · up(x))
    Gated([Linear; 3], Activation),
    /// down(f(up(x)))
    Plain([Linear; 2], Activation),
}

fn activate(activation: Activation, hidden_states: &Tensor) -> Tensor {
    match activation {
        Activation::Silu => hidden_states.silu(),
        Activation::Gelu => hidden_states.gelu("none"),
        Activation::GeluTanh => hidden_states.gelu("tanh"),
        Activation::Relu => hidden_states.relu(),
    }
}

#[derive(Debug)]
struct Layer {
    index: usize,
    attention_norm: Norm,
    qkv: Qkv,
    output: Linear,
    mlp_norm: Norm,
    mlp: Mlp,
    head_dim: i64,
}

impl Layer {
    /// `input: [tokens, hidden_size]` → the same shape; `ahead` are keys and values before all others.
    fn forward(
        &self,
        input: &Tensor,
        rotary: Option<&(Tensor, Tensor)>,
        ahead: Option<(&Tensor, &Tensor)>,
        attend: &dyn Attend,
        sites: &dyn Sites,
    ) -> Result<Tensor> {
        let normed = self.attention_norm.forward(input, sites)?;
        let heads = |t: Tensor| t.view([t.size()[0], -1, self.head_dim]); // [tokens, heads, head_dim]
        let [mut query, mut key, mut value] = match &self.qkv {
            Qkv::Separate(qkv) => {
                let [q, k, v] = qkv.as_ref();
                [heads(sites.linear(q, &normed)?), heads(sites.linear(k, &normed)?), heads(sites.linear(v, &normed)?)]
            }
            Qkv::Joint(joint) => {
                let parts = sites.linear(joint, &normed)?.chunk(3, -1);
                [0, 1, 2].map(|i| heads(parts[i].contiguous()))
            }
        };
        if let Some((cos, sin)) = rotary {
            query = pt_tensor::apply_rotary(&query, cos, sin)?;
            key = pt_tensor::apply_rotary(&key, cos, sin)?;
        }
        if let Some((keys, values)) = ahead {
            key = Tensor::f_cat(&[keys, &key], 0)?;
            value = Tensor::f_cat(&[values, &value], 0)?;
        }
        let attended = attend.attend(self.index, &query, &key, &value)?;
        let attended = attended.view([attended.size()[0], -1]);
        let branch = sites.linear(&self.output, &attended)?;
        let site = |branch, residual, input| BranchSite { branch, layer: self.index, residual, input };
        let branch = sites.branch(&site(Branch::Attention, input, &normed), branch)?;
        let hidden_states = input + branch;

        let normed = self.mlp_norm.forward(&hidden_states, sites)?;
        let branch = match &self.mlp {
            Mlp::Gated([gate, up, down], activation) => {
                let (gate, up) = (sites.linear(gate, &normed)?, sites.linear(up, &normed)?);
                let inner = match activation {
                    Activation::Silu => pt_tensor::swiglu(&gate, &up)?,
                    other => activate(*other, &gate) * up,
                };
                sites.linear(down, &inner)?
            }
            Mlp::Plain([up, down], activation) => {
                sites.linear(down, &activate(*activation, &sites.linear(up, &normed)?))?
            }
        };
        let branch = sites.branch(&site(Branch::Mlp, &hidden_states, &normed), branch)?;
        let site = GapSite { layer: self.index, input, tokens: attend };
        sites.gap(&site, hidden_states + branch)
    }

    fn linears(&self) -> Vec<&Linear> {
        let mut all: Vec<&Linear> = match &self.qkv {
            Qkv::Separate(qkv) => qkv.iter().collect(),
            Qkv::Joint(joint) => vec![joint],
        };
        all.push(&self.output);
        match &self.mlp {
            Mlp::Gated(parts, _) => all.extend(parts),
            Mlp::Plain(parts, _) => all.extend(parts),
        }
        all
    }

    fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all: Vec<&mut Linear> = match &mut self.qkv {
            Qkv::Separate(qkv) => qkv.iter_mut().collect(),
            Qkv::Joint(joint) => vec![joint],
        };
        all.push(&mut self.output);
        match &mut self.mlp {
            Mlp::Gated(parts, _) => all.extend(parts),
            Mlp::Plain(parts, _) => all.extend(parts),
        }
        all
    }
}

/// Name of GPT-2's learned positions.
const POSITIONS: &str = "transformer.wpe.weight";

/// How the weights of linear layers are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LinearFormat {
    /// As the checkpoint has them: dense, or in 4 bits where it is quantized so.
    #[default]
    AsStored,
    /// In NF4, quantized while loading unless they are so already.
    Nf4 {
        /// How they are quantized.
        options: Nf4Options,
        /// How they are multiplied.
        arithmetic: Nf4Arithmetic,
        /// Whether the output layer is too; QLoRA leaves it dense. A tied embedding stays dense either way.
        with_output: bool,
    },
}

/// What a model's weights take in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WeightMemory {
    /// Weights that are held otherwise than as dense tensors: those of linear layers in 4 bits.
    pub num_quantized: usize,
    /// Bytes of their codes and scales.
    pub quantized_bytes: usize,
    /// Bytes of everything else.
    pub dense_bytes: usize,
}

/// How a forward pass over a packed batch is run.
#[derive(Debug, Clone, Copy, Default)]
pub struct RunOptions {
    /// Keep only each layer's input and compute the layer again in the backward pass.
    pub is_checkpointed: bool,
}

/// A decoder language model with frozen or trainable weights.
#[derive(Debug)]
pub struct CausalLm {
    config: ModelConfig,
    device: Device,
    kind: Kind,
    embed_path: &'static str,
    embedding: Tensor,
    /// GPT-2's learned positions, `[max_positions, hidden_size]`.
    position_embedding: Option<Tensor>,
    layers: Vec<Rc<Layer>>,
    final_norm: Norm,
    lm_head: Linear,
    rope: Option<RefCell<Rope>>,
}

impl CausalLm {
    /// Loads the weights of a checkpoint to `device` in `kind`, tensor by tensor.
    ///
    /// # Errors
    /// [`ModelError`] for a tensor that is missing, has another shape than the config says, or is left over.
    pub fn load(pretrained: &Pretrained, device: Device, kind: Kind) -> Result<Self> {
        Self::load_with(pretrained, device, kind, LinearFormat::AsStored)
    }

    /// As [`load`](Self::load), with the linear layers in another format: each is quantized as it is read, so that the dense model never
    /// exists as a whole.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_with(pretrained: &Pretrained, device: Device, kind: Kind, format: LinearFormat) -> Result<Self> {
        Self::from_source_with(&pretrained.config, pretrained.tensors.as_ref(), device, kind, format)
    }

    /// As [`load`](Self::load), from a config and any source of tensors by Hugging Face name.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_source(config: &ModelConfig, source: &dyn TensorSource, device: Device, kind: Kind) -> Result<Self> {
        Self::from_source_with(config, source, device, kind, LinearFormat::AsStored)
    }

    fn from_source_with(
        config: &ModelConfig,
        source: &dyn TensorSource,
        device: Device,
        kind: Kind,
        format: LinearFormat,
    ) -> Result<Self> {
        let mut loader = Loader { config, source, device, kind, format, next_index: 0, used: Vec::new() };
        let gpt2 = config.architecture == Architecture::Gpt2;
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let embed_path = if gpt2 { "transformer.wte.weight" } else { "model.embed_tokens.weight" };
        let embedding = loader.tensor(embed_path, &[vocab, hidden])?;
        let position_embedding = match gpt2 {
            true => Some(loader.tensor(POSITIONS, &[config.max_position_embeddings, hidden])?),
            false => None,
        };
        let layers = (0..config.num_layers as usize)
            .map(|index| Ok(Rc::new(if gpt2 { loader.gpt2_layer(index)? } else { loader.llama_layer(index)? })))
            .collect::<Result<Vec<_>>>()?;
        let final_norm = loader.norm(if gpt2 { "transformer.ln_f" } else { "model.norm" }, gpt2)?;
        let lm_head = if config.tie_word_embeddings {
            loader.used.push("lm_head.weight".into());
            let weight: Rc<dyn Weight> = match format {
                LinearFormat::Nf4 { options, arithmetic, with_output: true } => {
                    let stored = source.tensor(embed_path, Kind::Float, Device::Cpu)?;
                    Rc::new(Nf4Weight::quantize_as(&stored, options, kind, device)?.with_arithmetic(arithmetic))
                }
                _ => Rc::new(DenseWeight::new(embedding.shallow_clone())?),
            };
            Linear {
                index: loader.take_index(),
                path: "lm_head".into(),
                weight,
                bias: None,
                is_transposed_in_file: false,
            }
        } else {
            loader.linear("lm_head", hidden, vocab, false, false)?
        };
        loader.check_all_used()?;
        let rope = (!gpt2).then(|| RefCell::new(Rope::new(config, device)));
        Ok(Self {
            config: config.clone(),
            device,
            kind,
            embed_path,
            embedding,
            position_embedding,
            layers,
            final_norm,
            lm_head,
            rope,
        })
    }

    /// What the checkpoint says of the architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Device of the weights.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Kind of weights and activations.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// All linear layers in index order; the output layer, tied or not, is the last.
    pub fn linear_layers(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(|layer| layer.linears()).chain(std::iter::once(&self.lm_head))
    }

    /// As [`linear_layers`](Self::linear_layers), to exchange weights (merging, quantization).
    ///
    /// # Errors
    /// [`ModelError::InUse`] while a graph of a checkpointed forward pass still holds the layers.
    pub fn linear_layers_mut(&mut self) -> Result<Vec<&mut Linear>> {
        let mut all = Vec::new();
        for layer in &mut self.layers {
            all.extend(Rc::get_mut(layer).ok_or(ModelError::InUse)?.linears_mut());
        }
        all.push(&mut self.lm_head);
        Ok(all)
    }

    /// The input embedding: the path of its module and its table, `[vocab_size, hidden_size]`.
    pub fn embedding(&self) -> (&str, &Tensor) {
        (self.embed_path.strip_suffix(".weight").unwrap_or(self.embed_path), &self.embedding)
    }

    /// Embeddings and norms by their Hugging Face names, the input embedding first.
    pub fn plain_parameters(&self) -> Vec<(String, Tensor)> {
        let mut all = vec![(self.embed_path.to_string(), self.embedding.shallow_clone())];
        if let Some(positions) = &self.position_embedding {
            all.push((POSITIONS.into(), positions.shallow_clone()));
        }
        let mut norms: Vec<&Norm> = self.layers.iter().flat_map(|l| [&l.attention_norm, &l.mlp_norm]).collect();
        norms.push(&self.final_norm);
        for norm in norms {
            all.push((format!("{}.weight", norm.path), norm.weight.shallow_clone()));
            if let Some(bias) = &norm.bias {
                all.push((format!("{}.bias", norm.path), bias.shallow_clone()));
            }
        }
        all
    }

    /// Linear layers with a weight of their own: a tied output layer is left out, one that a merge has untied is not.
    fn own_linears(&self) -> impl Iterator<Item = &Linear> {
        self.linear_layers().filter(|linear| linear.path != "lm_head" || !self.is_output_tied())
    }

    /// Whether the output layer is the embedding, or a 4-bit copy of it; merging gives it a dense weight of its own.
    fn is_output_tied(&self) -> bool {
        let weight = &self.lm_head.weight;
        let is_embedding = weight.parameter().is_some_and(|w| w.data_ptr() == self.embedding.data_ptr());
        self.config.tie_word_embeddings && (is_embedding || weight.as_nf4().is_some())
    }

    /// What the weights take in memory, by part.
    pub fn memory(&self) -> WeightMemory {
        let bytes = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
        let dense_bytes = self.plain_parameters().iter().map(|(_, tensor)| bytes(tensor)).sum();
        let mut memory = WeightMemory { dense_bytes, ..Default::default() };
        for linear in self.linear_layers() {
            memory.dense_bytes += linear.bias.as_ref().map_or(0, bytes);
            match linear.weight.parameter() {
                // A tied output layer is the embedding, which is counted.
                Some(dense) if dense.data_ptr() == self.embedding.data_ptr() => {}
                Some(_) => memory.dense_bytes += linear.weight.num_bytes(),
                None => {
                    let (out_features, in_features) = linear.weight.size();
                    memory.num_quantized += (out_features * in_features) as usize;
                    memory.quantized_bytes += linear.weight.num_bytes();
                }
            }
        }
        memory
    }

    /// Every parameter by its Hugging Face name, in the file's layout, with weights that are held in 4 bits as the tensors that bitsandbytes
    /// saves: what [`quantized_config`](crate::quantized_config) describes.
    ///
    /// # Errors
    /// When a weight cannot be saved.
    pub fn named_parameters_in_4_bits(&self) -> Result<Vec<(String, Tensor)>> {
        let mut all = self.plain_parameters();
        for linear in self.own_linears() {
            let name = format!("{}.weight", linear.path);
            match linear.weight.as_nf4() {
                Some(nf4) => all.extend(nf4.tensors(&name)?),
                None => {
                    let dense = linear.weight.dense()?;
                    all.push((name, if linear.is_transposed_in_file { dense.tr() } else { dense }));
                }
            }
            all.extend(linear.bias.iter().map(|bias| (format!("{}.bias", linear.path), bias.shallow_clone())));
        }
        Ok(all)
    }

    /// Every parameter by its Hugging Face name, in the file's layout. A tied output layer is left out; one that a
    /// merge has untied is there as `lm_head.weight`.
    ///
    /// # Errors
    /// When a weight cannot be decoded to a dense tensor.
    pub fn named_parameters(&self) -> Result<Vec<(String, Tensor)>> {
        let mut all = self.plain_parameters();
        for linear in self.own_linears() {
            let dense = linear.weight.dense()?;
            all.push((
                format!("{}.weight", linear.path),
                if linear.is_transposed_in_file { dense.tr() } else { dense },
            ));
            if let Some(bias) = &linear.bias {
                all.push((format!("{}.bias", linear.path), bias.shallow_clone()));
            }
        }
        Ok(all)
    }

    /// Every bias, of norms and linear layers, by its Hugging Face name; no weight is decoded.
    pub fn biases(&self) -> Vec<(String, Tensor)> {
        let mut all = self.plain_parameters();
        all.retain(|(name, _)| name.ends_with(".bias"));
        for linear in self.own_linears() {
            all.extend(linear.bias.iter().map(|bias| (format!("{}.bias", linear.path), bias.shallow_clone())));
        }
        all
    }

    /// A parameter by its Hugging Face name, in the file's layout; for the output layer also where it is tied. Only this one is decoded
    /// if it is quantized.
    pub fn parameter(&self, path: &str) -> Option<Tensor> {
        if let Some((_, tensor)) = self.plain_parameters().into_iter().find(|(name, _)| name == path) {
            return Some(tensor);
        }
        let (module, part) = path.rsplit_once('.')?;
        let linear = self.linear_layers().find(|linear| linear.path == module)?;
        match part {
            "weight" if module == "lm_head" && self.is_output_tied() => Some(self.embedding.shallow_clone()),
            "weight" => {
                let dense = linear.weight.dense().ok()?;
                Some(if linear.is_transposed_in_file { dense.tr() } else { dense })
            }
            "bias" => linear.bias.as_ref().map(Tensor::shallow_clone),
            _ => None,
        }
    }

    /// Makes every weight a trained leaf, for full fine-tuning; returns them by name, linear weights as
    /// `[out_features, in_features]`.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] when a weight is not stored as a plain tensor.
    pub fn train_all(&mut self) -> Result<Vec<(String, Tensor)>> {
        let mut leaves = self.plain_parameters();
        for linear in self.own_linears() {
            let weight = linear.weight.parameter().ok_or_else(|| ModelError::Unsupported {
                what: format!("full fine-tuning of `{}`, which is not a dense weight,", linear.path),
            })?;
            leaves.push((format!("{}.weight", linear.path), weight.shallow_clone()));
            leaves.extend(linear.bias.iter().map(|bias| (format!("{}.bias", linear.path), bias.shallow_clone())));
        }
        for (_, leaf) in &leaves {
            let _ = leaf.set_requires_grad(true);
        }
        Ok(leaves)
    }

    /// Final hidden states before the last norm of all tokens of a batch, `[total_tokens, hidden_size]`, for their
    /// `positions` in their sequences; `ahead` are virtual tokens that this run computes or brings.
    fn run(
        &self,
        input_ids: &Tensor,
        positions: &Tensor,
        ahead: Option<VirtualTokens>,
        attend: Rc<dyn Attend>,
        sites: &Rc<dyn Sites>,
        options: RunOptions,
    ) -> Result<Tensor> {
        let num_virtual = sites.num_virtual_tokens() as i64;
        let (length, context) =
            (positions.f_max()?.int64_value(&[]) + 1 + num_virtual, self.config.max_position_embeddings);
        if length > context {
            let (length, virtual_tokens) = (length as usize, num_virtual as usize);
            return Err(ModelError::TooLong { length, virtual_tokens, context: context as usize });
        }
        let mut positions = if num_virtual > 0 { positions + num_virtual } else { positions.shallow_clone() };
        let replaced = sites.parameter(self.embed_path);
        let table = replaced.as_ref().unwrap_or(&self.embedding);
        let mut hidden_states = Tensor::f_embedding(table, input_ids, -1, false, false)?.to_kind(self.kind);
        hidden_states = sites.embedding(input_ids, hidden_states)?;
        let (mut num_computed, mut keys_values) = (0, Vec::new());
        match ahead {
            Some(VirtualTokens::Embeddings(rows)) => {
                num_computed = rows.size()[0];
                hidden_states = Tensor::f_cat(&[rows.to_kind(self.kind), hidden_states], 0)?;
                let first = Tensor::arange(num_computed, (Kind::Int64, positions.device()));
                positions = Tensor::f_cat(&[first, positions], 0)?;
            }
            Some(VirtualTokens::KeysValues(layers)) => {
                let in_kind = |(key, value): (Tensor, Tensor)| (key.to_kind(self.kind), value.to_kind(self.kind));
                keys_values = layers.into_iter().map(in_kind).collect();
            }
            None => {}
        }
        if let Some(table) = &self.position_embedding {
            let replaced = sites.parameter(POSITIONS);
            let table = replaced.as_ref().unwrap_or(table);
            hidden_states += table.f_index_select(0, &positions)?.to_kind(self.kind);
        }
        let rotary = self.rope.as_ref().map(|rope| rope.borrow_mut().at(&positions, length));
        for layer in &self.layers {
            let ahead = keys_values.get(layer.index);
            hidden_states = if options.is_checkpointed {
                // A reentrant checkpoint needs an input that asks for a gradient, also below the first adapter.
                if !hidden_states.requires_grad() {
                    hidden_states = hidden_states.detach().set_requires_grad(true);
                }
                let (layer, attend, sites) = (layer.clone(), attend.clone(), sites.clone());
                let rotary = rotary.as_ref().map(|(cos, sin)| (cos.shallow_clone(), sin.shallow_clone()));
                let inputs: Vec<&Tensor> =
                    std::iter::once(&hidden_states).chain(ahead.into_iter().flat_map(|(k, v)| [k, v])).collect();
                pt_tensor::checkpoint(&inputs, move |inputs| {
                    let ahead = inputs.get(1).zip(inputs.get(2));
                    layer
                        .forward(&inputs[0], rotary.as_ref(), ahead, attend.as_ref(), sites.as_ref())
                        .map_err(TensorError::from)
                })?
            } else {
                let ahead = ahead.map(|(key, value)| (key, value));
                layer.forward(&hidden_states, rotary.as_ref(), ahead, attend.as_ref(), sites.as_ref())?
            };
        }
        let own = hidden_states.size()[0] - num_computed;
        Ok(if num_computed > 0 { hidden_states.narrow(0, num_computed, own) } else { hidden_states })
    }

    /// The run of a packed batch.
    fn run_packed(&self, batch: &PackedBatch, sites: &Rc<dyn Sites>, options: RunOptions) -> Result<Tensor> {
        let ahead = sites.virtual_tokens()?;
        let plan = behind(&batch.plan, sites.num_virtual_tokens(), ahead.as_ref());
        let attend =
            Packed { plan, scale: self.attention_scale(), window: self.config.sliding_window, order: OnceCell::new() };
        self.run(&batch.input_ids, &batch.positions, ahead, Rc::new(attend), sites, options)
    }

    pub(crate) fn attention_scale(&self) -> f64 {
        1.0 / (self.config.head_dim as f64).sqrt()
    }

    /// Normed hidden states of all tokens, `[total_tokens, hidden_size]`.
    ///
    /// # Errors
    /// When a shape does not fit or a sequence is longer than the context.
    pub fn hidden_states(&self, batch: &PackedBatch, sites: &Rc<dyn Sites>, options: RunOptions) -> Result<Tensor> {
        let sites = &routed(sites, &batch.prompt_of_token)?;
        let hidden_states = self.run_packed(batch, sites, options)?;
        self.final_norm.forward(&hidden_states, sites.as_ref())
    }

    /// Normed hidden states of some tokens, `[num_positions, hidden_size]`, for their `positions` in the batch: what a head
    /// over them reads (a value, a reward). `prompt_of_position` are the prompt groups that they belong to.
    ///
    /// # Errors
    /// As [`hidden_states`](Self::hidden_states).
    pub fn hidden_states_at(
        &self,
        batch: &PackedBatch,
        (positions, prompt_of_position): (&Tensor, &[usize]),
        sites: &Rc<dyn Sites>,
        run: RunOptions,
    ) -> Result<Tensor> {
        let on_tokens = routed(sites, &batch.prompt_of_token)?;
        let hidden_states = self.run_packed(batch, &on_tokens, run)?;
        let states = hidden_states.f_index_select(0, positions)?;
        self.final_norm.forward(&states, routed(sites, prompt_of_position)?.as_ref())
    }

    /// Normed hidden states that predict a batch's labels, `[num_labels, hidden_size]`.
    ///
    /// # Errors
    /// As [`hidden_states`](Self::hidden_states).
    pub fn label_states(&self, batch: &PackedBatch, sites: &Rc<dyn Sites>, run: RunOptions) -> Result<Tensor> {
        self.hidden_states_at(batch, (&batch.label_positions, &batch.prompt_of_label), sites, run)
    }

    /// Log-probs of a batch's labels from the states that predict them, as [`label_states`](Self::label_states) gives them.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn logprobs_of_states(
        &self,
        states: &Tensor,
        batch: &PackedBatch,
        sites: &Rc<dyn Sites>,
        options: &LabelLogprobs,
    ) -> Result<LabelOutput> {
        let sites = routed(sites, &batch.prompt_of_label)?;
        let (states, weight) = sites.output(&self.lm_head, states)?;
        Ok(pt_tensor::label_logprobs(&states, &weight, &batch.label_ids, options)?)
    }

    /// Log-probs of a batch's labels, `[num_labels]`; only the states that predict are normed and projected.
    ///
    /// # Errors
    /// As [`hidden_states`](Self::hidden_states).
    pub fn label_logprobs(
        &self,
        batch: &PackedBatch,
        sites: &Rc<dyn Sites>,
        run: RunOptions,
        options: &LabelLogprobs,
    ) -> Result<LabelOutput> {
        let states = self.label_states(batch, sites, run)?;
        self.logprobs_of_states(&states, batch, sites, options)
    }

    /// Logits of normed hidden states, `[.., vocab_size]`: for sampling and tests, not for training.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn logits(&self, hidden_states: &Tensor, sites: &dyn Sites) -> Result<Tensor> {
        sites.linear(&self.lm_head, hidden_states)
    }

    /// One step over a cache: `[tokens]` ids at positions → logits of `last` tokens, one a prompt, or of all,
    /// `[.., vocab_size]`. The step that fills the cache brings the virtual tokens.
    #[allow(clippy::too_many_arguments, reason = "one call a step, from two places")]
    pub(crate) fn step(
        &self,
        input_ids: &Tensor,
        positions: &Tensor,
        ahead: Option<VirtualTokens>,
        attend: Rc<dyn Attend>,
        last: Option<&Tensor>,
        prompt_of_token: &[usize],
        sites: &Rc<dyn Sites>,
    ) -> Result<Tensor> {
        let on_tokens = routed(sites, prompt_of_token)?;
        let mut hidden_states = self.run(input_ids, positions, ahead, attend, &on_tokens, RunOptions::default())?;
        let mut on_last = on_tokens;
        if let Some(last) = last {
            hidden_states = hidden_states.index_select(0, last);
            on_last = routed(sites, &(0..last.size()[0] as usize).collect::<Vec<_>>())?;
        }
        let normed = self.final_norm.forward(&hidden_states, on_last.as_ref())?;
        self.logits(&normed, on_last.as_ref())
    }
}

/// The sites of one run over tokens of these prompts.
pub(crate) fn routed(sites: &Rc<dyn Sites>, prompt_of_token: &[usize]) -> Result<Rc<dyn Sites>> {
    Ok(sites.routed(prompt_of_token)?.unwrap_or_else(|| sites.clone()))
}

/// A batch's plan behind virtual tokens.
pub(crate) fn behind(
    plan: &Arc<AttentionPlan>,
    num_virtual: usize,
    virtual_tokens: Option<&VirtualTokens>,
) -> Arc<AttentionPlan> {
    match virtual_tokens {
        Some(tokens) => Arc::new(plan.behind(num_virtual as i64, matches!(tokens, VirtualTokens::Embeddings(_)))),
        None => plan.clone(),
    }
}

/// Takes tensors out of a source, checks shapes, and remembers what was used.
struct Loader<'a> {
    config: &'a ModelConfig,
    source: &'a dyn TensorSource,
    device: Device,
    kind: Kind,
    format: LinearFormat,
    next_index: usize,
    used: Vec<String>,
}

impl Loader<'_> {
    fn take_index(&mut self) -> usize {
        self.next_index += 1;
        self.next_index - 1
    }

    fn tensor(&mut self, name: &str, shape: &[i64]) -> Result<Tensor> {
        self.tensor_as(name, shape, self.kind, self.device)
    }

    fn tensor_as(&mut self, name: &str, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
        let tensor = self.source.tensor(name, kind, device)?;
        self.check_shape(name, &tensor.size(), shape)?;
        self.used.push(name.into());
        Ok(tensor)
    }

    fn check_shape(&self, name: &str, found: &[i64], expected: &[i64]) -> Result<()> {
        if found == expected {
            return Ok(());
        }
        Err(ModelError::Shape {
            path: self.source.path().to_path_buf(),
            name: name.into(),
            found: found.to_vec(),
            expected: expected.to_vec(),
        })
    }

    fn linear(
        &mut self,
        path: &str,
        input: i64,
        output: i64,
        has_bias: bool,
        is_transposed_in_file: bool,
    ) -> Result<Linear> {
        let name = format!("{path}.weight");
        let weight = self.linear_weight(&name, input, output, is_transposed_in_file)?;
        let bias = has_bias.then(|| self.tensor(&format!("{path}.bias"), &[output])).transpose()?;
        Ok(Linear { index: self.take_index(), path: path.into(), weight, bias, is_transposed_in_file })
    }

    fn linear_weight(&mut self, name: &str, input: i64, output: i64, is_transposed: bool) -> Result<Rc<dyn Weight>> {
        let arithmetic = match self.format {
            LinearFormat::Nf4 { arithmetic, .. } => arithmetic,
            LinearFormat::AsStored => Nf4Arithmetic::Exact,
        };
        if let Some(weight) = self.source.nf4(name, self.kind, self.device)? {
            let (rows, columns) = weight.size();
            self.check_shape(name, &[rows, columns], &[output, input])?;
            self.used.push(name.into());
            return Ok(Rc::new(weight.with_arithmetic(arithmetic)));
        }
        let options = match self.format {
            LinearFormat::Nf4 { options, with_output, .. } if with_output || name != "lm_head.weight" => Some(options),
            _ => None,
        };
        // What is quantized is read as it is stored, so that codes and scales do not depend on what products are computed in.
        let (kind, device) = if options.is_some() { (Kind::Float, Device::Cpu) } else { (self.kind, self.device) };
        let dense = if is_transposed {
            self.tensor_as(name, &[input, output], kind, device)?.tr().contiguous()
        } else {
            self.tensor_as(name, &[output, input], kind, device)?
        };
        Ok(match options {
            Some(options) => {
                let weight = Nf4Weight::quantize_as(&dense, options, self.kind, self.device)?;
                Rc::new(weight.with_arithmetic(arithmetic))
            }
            None => Rc::new(DenseWeight::new(dense)?),
        })
    }

    fn norm(&mut self, path: &str, has_bias: bool) -> Result<Norm> {
        let hidden = [self.config.hidden_size];
        let weight = self.tensor(&format!("{path}.weight"), &hidden)?;
        let bias = has_bias.then(|| self.tensor(&format!("{path}.bias"), &hidden)).transpose()?;
        Ok(Norm { path: path.into(), weight, bias, eps: self.config.norm_eps })
    }

    fn llama_layer(&mut self, index: usize) -> Result<Layer> {
        let config = self.config;
        let path = format!("model.layers.{index}");
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let queries = config.num_heads * config.head_dim;
        let keys = config.num_kv_heads * config.head_dim;
        let attention_norm = self.norm(&format!("{path}.input_layernorm"), false)?;
        let bias = config.qkv_bias;
        let mut linear =
            |part: &str, input, output, bias| self.linear(&format!("{path}.{part}"), input, output, bias, false);
        let qkv = Qkv::Separate(Box::new([
            linear("self_attn.q_proj", hidden, queries, bias)?,
            linear("self_attn.k_proj", hidden, keys, bias)?,
            linear("self_attn.v_proj", hidden, keys, bias)?,
        ]));
        let output = linear("self_attn.o_proj", queries, hidden, config.attention_output_bias)?;
        let mlp = Mlp::Gated(
            [
                linear("mlp.gate_proj", hidden, inner, config.mlp_bias)?,
                linear("mlp.up_proj", hidden, inner, config.mlp_bias)?,
                linear("mlp.down_proj", inner, hidden, config.mlp_bias)?,
            ],
            config.hidden_act,
        );
        let mlp_norm = self.norm(&format!("{path}.post_attention_layernorm"), false)?;
        Ok(Layer { index, attention_norm, qkv, output, mlp_norm, mlp, head_dim: config.head_dim })
    }

    fn gpt2_layer(&mut self, index: usize) -> Result<Layer> {
        let path = format!("transformer.h.{index}");
        let (hidden, inner) = (self.config.hidden_size, self.config.intermediate_size);
        let attention_norm = self.norm(&format!("{path}.ln_1"), true)?;
        let mut linear = |part: &str, input, output| self.linear(&format!("{path}.{part}"), input, output, true, true);
        let qkv = Qkv::Joint(Box::new(linear("attn.c_attn", hidden, 3 * hidden)?));
        let output = linear("attn.c_proj", hidden, hidden)?;
        let mlp = Mlp::Plain(
            [linear("mlp.c_fc", hidden, inner)?, linear("mlp.c_proj", inner, hidden)?],
            self.config.hidden_act,
        );
        let mlp_norm = self.norm(&format!("{path}.ln_2"), true)?;
        Ok(Layer { index, attention_norm, qkv, output, mlp_norm, mlp, head_dim: self.config.head_dim })
    }

    /// Strict loading: a tensor that nothing used means that the architecture is not the one we think.
    fn check_all_used(&self) -> Result<()> {
        let extra: Vec<String> = self.source.names().into_iter().filter(|name| !self.used.contains(name)).collect();
        if extra.is_empty() {
            return Ok(());
        }
        Err(ModelError::UnexpectedTensors { path: self.source.path().to_path_buf(), names: extra })
    }
}
