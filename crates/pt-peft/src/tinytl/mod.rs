//! TinyTL: biases and lite residual branches, for which frozen layers keep no input.
//!
//! The paper's networks are convolutional. What is re-derived here for the blocks of a transformer:
//!
//! - Feature maps are pooled by two in each direction; here tokens are pooled by two along their sequence. A token sees
//!   the pairs that are complete up to it, so the branch is causal: a token's value does not depend on later ones, and
//!   decoding token by token gives what the whole sequence does.
//! - What is upsampled (bilinearly in the paper) is here the value of the last such pair; the first token of a sequence
//!   gets nothing.
//! - The grouped convolution runs over the pooled tokens, zeros before the first; the 1×1 convolution is a linear layer.
//! - Norms are the paper's group norms of eight channels, here over the channels of one token alone: statistics over
//!   tokens would look ahead, and would depend on what else is in the batch. Both convolutions' weights are standardised.
//! - The last norm's weight starts at zero, so the model starts as it was. Its bias stays zero where biases are trained,
//!   as in the paper; where branches alone are trained, it is trained too.
//! - The paper also stores the frozen weights in 8 bits; here that is the base's own matter (NF4, say).

mod config;
mod pooled;

pub use config::{TinytlConfig, TinytlMode};

use crate::adapter::{Adapter, State, for_use};
use crate::base::{Base, layer_path};
use crate::bitfit::Biases;
use crate::error::to_model;
use crate::files;
use crate::init::uniform;
use crate::target::Strictness;
use crate::{PeftError, Result};
use pooled::{Pools, standardized};
use pt_model::{CausalLm, GapSite, Linear, Sites, TokenOrder};
use pt_tensor::{Kind, Tensor, no_grad};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

/// Channels of a group of the norms.
const CHANNELS_PER_GROUP: i64 = 8;
const NORM_EPS: f64 = 1e-5;

/// The lite residual branch of one layer; f32 leaves.
#[derive(Debug)]
struct LiteResidual {
    /// What its tensors' names begin with: `model.layers.0.lite_residual`.
    path: String,
    /// The grouped convolution, `[width, hidden_size / groups, kernel_size]`.
    conv: Tensor,
    /// Its norm, weight and bias `[width]`.
    norm: [Tensor; 2],
    /// The 1×1 convolution, `[hidden_size, width]`.
    pointwise: Tensor,
    /// The last norm, weight and bias `[hidden_size]`; the bias is zero where it is not trained.
    final_norm: [Tensor; 2],
}

impl LiteResidual {
    /// Names and sizes of its tensors.
    fn layout(path: &str, config: &TinytlConfig, hidden_size: i64, width: i64) -> [(String, Vec<i64>); 6] {
        let conv = vec![width, hidden_size / config.groups, config.kernel_size];
        [
            ("conv.weight", conv),
            ("norm.weight", vec![width]),
            ("norm.bias", vec![width]),
            ("pointwise.weight", vec![hidden_size, width]),
            ("final_norm.weight", vec![hidden_size]),
            ("final_norm.bias", vec![hidden_size]),
        ]
        .map(|(name, size)| (format!("{path}.{name}"), size))
    }

    /// Its tensors in the order of [`layout`](Self::layout).
    fn tensors(&self) -> [&Tensor; 6] {
        let Self { conv, norm, pointwise, final_norm, .. } = self;
        [conv, &norm[0], &norm[1], pointwise, &final_norm[0], &final_norm[1]]
    }

    /// What the branch gives for each pooled token, `[pools, hidden_size]`.
    ///
    /// Nothing inside is kept for the backward pass, which computes it again: only the layer's input, which the layer's
    /// own norm keeps in any case. The branch is small, and its pooled tokens half as many as the others.
    fn forward(&self, rows: &Tensor, pools: &Rc<Pools>, groups: i64) -> Result<Tensor> {
        let inputs = std::iter::once(rows).chain(self.tensors());
        if !for_use(&self.conv).requires_grad() {
            let inputs: Vec<Tensor> = inputs.map(Tensor::shallow_clone).collect();
            return through(&inputs, pools, groups);
        }
        let pools = pools.clone();
        let block = move |inputs: &[Tensor]| through(inputs, &pools, groups).map_err(|error| to_model(error).into());
        Ok(pt_tensor::checkpoint(&inputs.collect::<Vec<_>>(), block)?)
    }
}

/// The branch, on rows and its six tensors.
fn through(inputs: &[Tensor], pools: &Pools, groups: i64) -> Result<Tensor> {
    let [rows, conv, norm_weight, norm_bias, pointwise, final_weight, final_bias] = inputs else {
        return Err(PeftError::State(format!("a lite residual branch has 7 inputs, found {}", inputs.len())));
    };
    let kind = rows.kind();
    let group_norm = |x: &Tensor, weight: &Tensor, bias: &Tensor| {
        let (weight, bias) = (weight.to_kind(kind), bias.to_kind(kind));
        x.f_group_norm(x.size()[1] / CHANNELS_PER_GROUP, Some(&weight), Some(&bias), NORM_EPS, false)
    };
    let pooled = pools.pool(rows)?;
    let low = pools.convolve(&pooled, &standardized(conv)?.to_kind(kind), groups)?; // [pools, width]
    let low = group_norm(&low, norm_weight, norm_bias)?.f_relu()?;
    let wide = low.f_linear(&standardized(pointwise)?.to_kind(kind), None::<Tensor>)?; // [pools, hidden_size]
    Ok(group_norm(&wide, final_weight, final_bias)?)
}

/// TinyTL on a model.
#[derive(Debug)]
pub struct TinytlAdapter {
    config: TinytlConfig,
    biases: Biases,
    /// By layer; none where branches are not trained.
    branches: Vec<LiteResidual>,
    /// The pooling of the last pass: the same for all its layers.
    pools: RefCell<Option<(Rc<TokenOrder>, Rc<Pools>)>>,
    state: State,
}

impl TinytlAdapter {
    /// A new adapter; it starts as the bare model. Each tensor has its own random stream from `seed` and its name.
    ///
    /// # Errors
    /// [`PeftError::Config`] for settings that cannot be, such as groups that do not divide the model's width.
    pub fn new(config: TinytlConfig, model: &CausalLm, seed: u64) -> Result<Self> {
        config.validate()?;
        let adapter = Self::assemble(config, model, Strictness::EveryName)?;
        for branch in &adapter.branches {
            for (name, weight) in [("conv", &branch.conv), ("pointwise", &branch.pointwise)] {
                let fan_in: i64 = weight.size()[1..].iter().product();
                let name = format!("{}.{name}.weight", branch.path);
                let values = uniform(seed, &name, weight.numel(), 1.0 / (fan_in as f32).sqrt());
                no_grad(|| weight.shallow_clone().copy_(&Tensor::from_slice(&values).view_as(weight)));
            }
        }
        Ok(adapter)
    }

    /// Loads an adapter that [`Adapter::save`] wrote.
    ///
    /// # Errors
    /// [`PeftError::NotAnAdapter`]; those of [`TinytlConfig::from_file`]; [`PeftError::Keys`] with the difference.
    pub fn load(folder: &Path, model: &CausalLm) -> Result<Self> {
        files::check_folder(folder)?;
        let config = TinytlConfig::from_file(&folder.join(files::CONFIG_FILE))?;
        let base = Base::from(model);
        let mut shapes: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        if config.has_biases() {
            let biases = Biases::copies(None, None, &base, Strictness::AnyName)?;
            shapes.extend(biases.iter().map(|(name, value)| (name.to_string(), value.size())));
        }
        if config.has_branches() {
            let hidden_size = model.config().hidden_size;
            let width = config.width(hidden_size, CHANNELS_PER_GROUP)?;
            for layer in 0..model.config().num_layers as usize {
                let path = branch_path(model, layer);
                let layout = LiteResidual::layout(&path, &config, hidden_size, width);
                shapes.extend(layout.into_iter().filter(|(name, _)| is_trained(name, &config)));
            }
        }
        // Compared before anything is allocated from the sizes that the settings claim.
        let file = files::AdapterFile::open(folder, &base, files::MODULES, &shapes)?;
        let adapter = Self::assemble(config, model, Strictness::AnyName)?;
        file.read_into(adapter.entries())?;
        Ok(adapter)
    }

    /// The adapter with convolutions of zero.
    fn assemble(config: TinytlConfig, model: &CausalLm, strictness: Strictness) -> Result<Self> {
        let base = Base::from(model);
        let biases = match config.has_biases() {
            true => Biases::copies(None, None, &base, strictness)?,
            false => Biases::none(&base),
        };
        let mut branches = Vec::new();
        if config.has_branches() {
            let hidden_size = model.config().hidden_size;
            let width = config.width(hidden_size, CHANNELS_PER_GROUP)?;
            for layer in 0..model.config().num_layers as usize {
                let path = branch_path(model, layer);
                let layout = LiteResidual::layout(&path, &config, hidden_size, width);
                let leaf = |(name, size): &(String, Vec<i64>)| -> Result<Tensor> {
                    let start = if name.ends_with(".norm.weight") { 1.0 } else { 0.0 };
                    let tensor = Tensor::f_full(size.as_slice(), start, (Kind::Float, model.device()))?;
                    Ok(tensor.set_requires_grad(is_trained(name, &config)))
                };
                let [conv, weight, bias, pointwise, final_weight, final_bias] = &layout;
                branches.push(LiteResidual {
                    conv: leaf(conv)?,
                    norm: [leaf(weight)?, leaf(bias)?],
                    pointwise: leaf(pointwise)?,
                    final_norm: [leaf(final_weight)?, leaf(final_bias)?],
                    path,
                });
            }
        }
        Ok(Self { config, biases, branches, pools: RefCell::new(None), state: State::new() })
    }

    fn entries(&self) -> Vec<files::Entry> {
        self.parameters().into_iter().map(|(name, tensor)| files::Entry::new(name, &tensor)).collect()
    }

    /// The settings.
    pub fn config(&self) -> &TinytlConfig {
        &self.config
    }

    /// What is trained, in words.
    fn in_words(&self) -> String {
        let mut parts = Vec::new();
        if self.config.has_biases() {
            parts.push(self.biases.in_words());
        }
        if self.config.has_branches() {
            parts.push(format!("a lite residual branch beside each of {} layers", self.branches.len()));
        }
        parts.join(", and ")
    }

    /// How the tokens of a pass are pooled.
    fn pools(&self, order: &Rc<TokenOrder>, rows: &Tensor) -> Rc<Pools> {
        let mut known = self.pools.borrow_mut();
        if let Some((_, pools)) = known.as_ref().filter(|(of, _)| Rc::ptr_eq(of, order)) {
            return pools.clone();
        }
        let pools = Rc::new(Pools::new(order, self.config.kernel_size, rows.device()));
        *known = Some((order.clone(), pools.clone()));
        pools
    }

    fn add_branch(&self, site: &GapSite<'_>, hidden_states: &Tensor) -> Result<Option<Tensor>> {
        let Some(branch) = self.branches.get(site.layer) else { return Ok(None) };
        // The token itself and 2k before it hold every pair that its last pooled token's convolution reads.
        let past = site.tokens.past(site.layer, site.input, 2 * self.config.kernel_size as usize)?;
        let pools = self.pools(&past.order, &past.rows);
        if pools.is_empty() {
            return Ok(None);
        }
        let update = branch.forward(&past.rows, &pools, self.config.groups)?;
        Ok(Some(pools.add_to(hidden_states, &update)?))
    }
}

fn branch_path(model: &CausalLm, layer: usize) -> String {
    format!("{}.lite_residual", layer_path(model, layer))
}

/// Whether a tensor of a branch is trained and kept in files: all but the last norm's bias, where biases are trained.
fn is_trained(name: &str, config: &TinytlConfig) -> bool {
    !(config.has_biases() && name.ends_with(".final_norm.bias"))
}

impl Sites for TinytlAdapter {
    fn linear(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<Tensor> {
        self.biases.linear(&self.state, layer, hidden_states).map_err(to_model)
    }

    fn gap(&self, site: &GapSite<'_>, hidden_states: Tensor) -> pt_model::Result<Tensor> {
        if !self.state.is_live() {
            return Ok(hidden_states);
        }
        Ok(self.add_branch(site, &hidden_states).map_err(to_model)?.unwrap_or(hidden_states))
    }

    fn parameter(&self, path: &str) -> Option<Tensor> {
        self.biases.parameter(&self.state, path)
    }
}

impl Adapter for TinytlAdapter {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        let mut all: Vec<_> = self.biases.iter().map(|(name, value)| (name.into(), value.shallow_clone())).collect();
        for branch in &self.branches {
            let names = LiteResidual::layout(&branch.path, &self.config, 0, 0).map(|(name, _)| name);
            let tensors = names.into_iter().zip(branch.tensors());
            let trained = tensors.filter(|(name, _)| is_trained(name, &self.config));
            all.extend(trained.map(|(name, tensor)| (name, tensor.shallow_clone())));
        }
        all
    }

    fn set_enabled(&self, is_enabled: bool) {
        self.state.is_enabled.set(is_enabled);
    }

    fn around_linear(
        &self,
        layer: &Linear,
        hidden_states: &Tensor,
        inner: &dyn Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        Ok(self.biases.around(&self.state, layer, inner(hidden_states)?))
    }

    fn replaced_parameters(&self) -> Vec<&str> {
        self.biases.replaced()
    }

    fn note(&self) -> Option<String> {
        Some(format!("TinyTL trains {}", self.in_words()))
    }

    fn save(&self, folder: &Path) -> Result<()> {
        files::save(
            folder,
            &self.config.to_text(),
            files::MODULES,
            self.entries(),
            &files::Card {
                base: self.config.base_model_name_or_path.as_deref(),
                tag: "tinytl",
                title: "TinyTL adapter",
                settings: format!("{}. The files are `pt`'s own; Python's PEFT does not read them", self.in_words()),
            },
        )
    }

    fn merge_into(&self, model: &mut CausalLm) -> Result<()> {
        if self.config.has_branches() {
            return Err(PeftError::NotMergeable {
                method: "TinyTL",
                reason: "its branches look back over tokens, which no weight of the model does; with `mode: bias` it can",
            });
        }
        self.state.merge(|| self.biases.merge(model))
    }

    fn unmerge_from(&self, model: &mut CausalLm) -> Result<()> {
        self.state.unmerge(&mut model.linear_layers_mut()?)
    }
}
