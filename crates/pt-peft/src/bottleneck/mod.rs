//! Bottleneck adapters: small networks after, or beside, the branches of a layer.

mod config;

pub use config::{BottleneckConfig, InitWeights, NonLinearity, Preset, ReductionFactor, Scaling, TrainedScaling};

use crate::adapter::{Adapter, State};
use crate::base::{Base, layer_path};
use crate::error::to_model;
use crate::files;
use crate::init::{normal, uniform};
use crate::{PeftError, Result};
use config::{ModelFacts, Resolved};
use pt_model::{Branch, BranchSite, CausalLm, Sites};
use pt_tensor::{Kind, Tensor, no_grad, random};
use std::collections::BTreeMap;
use std::path::Path;

/// The epsilon of torch's layer norm.
const NORM_EPS: f64 = 1e-5;

/// A weight and a bias, f32 leaves.
#[derive(Debug)]
struct Affine {
    weight: Tensor,
    bias: Tensor,
}

impl Affine {
    fn linear(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_linear(&self.weight.to_kind(x.kind()), Some(&self.bias.to_kind(x.kind())))?)
    }

    fn layer_norm(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (self.weight.to_kind(x.kind()), self.bias.to_kind(x.kind()));
        Ok(x.f_layer_norm(weight.size(), Some(&weight), Some(&bias), NORM_EPS, false)?)
    }
}

/// The adapter of one branch.
#[derive(Debug)]
struct Bottleneck {
    /// What its tensors' names begin with: `model.layers.0.output_adapters.adapters.default`.
    path: String,
    norm_before: Option<Affine>,
    /// `[width, hidden_size]`, `[width]`
    down: Affine,
    /// `[hidden_size, width]`, `[hidden_size]`
    up: Affine,
    norm_after: Option<Affine>,
    /// `[1]` or `[hidden_size]`, where it is trained.
    scaling: Option<Tensor>,
}

impl Bottleneck {
    /// Its trained tensors by the names that files have. AdapterHub's state holds a norm before the adapter under two
    /// names; this is the first.
    fn tensors(&self) -> Vec<(String, &Tensor)> {
        let position = usize::from(self.norm_before.is_some());
        let down = format!("adapter_down.{position}");
        let affines = [
            ("adapter_norm_before", self.norm_before.as_ref()),
            (down.as_str(), Some(&self.down)),
            ("adapter_up", Some(&self.up)),
            ("adapter_norm_after", self.norm_after.as_ref()),
        ];
        let mut all = Vec::new();
        for (name, affine) in affines {
            if let Some(Affine { weight, bias }) = affine {
                all.push((format!("{}.{name}.weight", self.path), weight));
                all.push((format!("{}.{name}.bias", self.path), bias));
            }
        }
        all.extend(self.scaling.iter().map(|scaling| (format!("{}.scaling", self.path), scaling)));
        all
    }

    /// What files hold: the tensors, and the norm before the adapter once more as the first of what goes down.
    fn entries(&self) -> Vec<files::Entry> {
        let mut all: Vec<_> = self.tensors().into_iter().map(|(name, t)| files::Entry::new(name, t)).collect();
        if let Some(Affine { weight, bias }) = &self.norm_before {
            all.push(files::Entry::new(format!("{}.adapter_down.0.weight", self.path), weight));
            all.push(files::Entry::new(format!("{}.adapter_down.0.bias", self.path), bias));
        }
        all
    }

    /// scaling · up(f(down(x))), with the new norm before it.
    fn network(&self, x: &Tensor, settings: &Resolved, dropout: f64) -> Result<Tensor> {
        let normed = self.norm_before.as_ref().map(|norm| norm.layer_norm(x)).transpose()?;
        let low = settings.non_linearity.apply(&self.down.linear(normed.as_ref().unwrap_or(x))?); // [tokens, width]
        let up = self.up.linear(&low)?;
        let up = match (&self.scaling, settings.scaling) {
            (Some(scaling), _) => up * scaling.to_kind(x.kind()),
            (None, Scaling::Number(scaling)) if scaling != 1.0 => up * scaling,
            _ => up,
        };
        if dropout == 0.0 {
            return Ok(up);
        }
        Ok(random::led_by_cpu(up.device(), || up.f_dropout(dropout, true))??)
    }

    /// The branch's output with the adapter: what is then added to the residual.
    ///
    /// AdapterHub gives the sum with the residual itself, by `original_ln_after`; here the model adds it, so where it is
    /// not to be added it is taken off.
    fn forward(&self, residual: &Tensor, branch: Tensor, settings: &Resolved, dropout: f64) -> Result<Tensor> {
        let after = |x: Tensor| match &self.norm_after {
            Some(norm) => norm.layer_norm(&x),
            None => Ok(x),
        };
        if settings.is_parallel {
            let output = after(self.network(residual, settings, dropout)?)? + branch;
            return Ok(if settings.original_ln_after { output } else { output - residual });
        }
        let input = if settings.original_ln_before { &branch + residual } else { branch.shallow_clone() };
        let update = self.network(&input, settings, dropout)?;
        let own_residual = if settings.residual_before_ln { &branch } else { &input };
        if settings.adapter_residual_before_ln {
            let output = after(update + own_residual)?;
            return Ok(if settings.original_ln_after { output } else { output - residual });
        }
        let update = after(update)?;
        Ok(match settings.original_ln_after {
            true => update + own_residual,
            // The adapter's own residual has the model's in it: the two that cancel are left out.
            false if settings.original_ln_before && !settings.residual_before_ln => update + branch,
            false => update + own_residual - residual,
        })
    }
}

/// Bottleneck adapters on a model, exactly as AdapterHub's classes of Llama, Mistral and GPT-2 apply them. (AdapterHub
/// has no class for Qwen2; its files are laid out the same here.)
///
/// All tensors are f32 leaves whatever the model computes in.
#[derive(Debug)]
pub struct BottleneckAdapter {
    config: BottleneckConfig,
    settings: Resolved,
    /// By layer: after attention, after the MLP.
    layers: Vec<[Option<Bottleneck>; 2]>,
    facts: ModelFacts,
    state: State,
}

/// A bottleneck and its width. Nothing of it is allocated yet.
struct Planned {
    layer: usize,
    branch: Branch,
    path: String,
    width: i64,
}

impl BottleneckAdapter {
    /// A new adapter. Each tensor has its own random stream from `seed` and its name.
    ///
    /// # Errors
    /// [`PeftError::Config`] for settings that cannot be; [`PeftError::Tensor`] when there is no memory for a width.
    pub fn new(config: BottleneckConfig, model: &CausalLm, seed: u64) -> Result<Self> {
        config.validate()?;
        let planned = Self::plan(&config, model)?;
        let adapter = Self::assemble(config, model, planned)?;
        for bottleneck in adapter.layers.iter().flatten().flatten() {
            let hidden_size = model.config().hidden_size as f32;
            for (part, affine) in [("adapter_down", &bottleneck.down), ("adapter_up", &bottleneck.up)] {
                let (name, len) = (format!("{}.{part}.weight", bottleneck.path), affine.weight.numel());
                let values = match (adapter.settings.init_weights, part) {
                    (InitWeights::Bert, _) => normal(seed, &name, len, 0.02, None),
                    (InitWeights::Houlsby, _) => normal(seed, &name, len, 0.01, Some(2.0)),
                    (InitWeights::MamAdapter, "adapter_down") => uniform(seed, &name, len, 1.0 / hidden_size.sqrt()),
                    (InitWeights::MamAdapter, _) => continue,
                };
                let values = Tensor::from_slice(&values).view_as(&affine.weight);
                no_grad(|| affine.weight.shallow_clone().copy_(&values));
            }
        }
        Ok(adapter)
    }

    /// Loads an adapter that AdapterHub or [`Adapter::save`] wrote.
    ///
    /// # Errors
    /// [`PeftError::NotAnAdapter`] for a folder without an adapter, or with pickled tensors only; those of
    /// [`BottleneckConfig::from_adapter_hub_file`]; [`PeftError::Keys`] with the difference.
    pub fn load(folder: &Path, model: &CausalLm) -> Result<Self> {
        files::check_folder_as(folder, &files::ADAPTER_HUB)?;
        let config = BottleneckConfig::from_adapter_hub_file(&folder.join(files::CONFIG_FILE))?;
        let planned = Self::plan(&config, model)?;
        let hidden_size = model.config().hidden_size;
        let settings = config.resolved();
        let mut shapes: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        for Planned { path, width, .. } in &planned {
            let mut expect = |name: &str, shape: &[i64]| {
                shapes.insert(format!("{path}.{name}"), shape.to_vec());
            };
            let norms = [("adapter_norm_after", settings.ln_after), ("adapter_norm_before", settings.ln_before)];
            let norms = norms.into_iter().chain([("adapter_down.0", settings.ln_before)]);
            for (norm, _) in norms.filter(|(_, is_there)| *is_there) {
                expect(&format!("{norm}.weight"), &[hidden_size]);
                expect(&format!("{norm}.bias"), &[hidden_size]);
            }
            let down = format!("adapter_down.{}", usize::from(settings.ln_before));
            expect(&format!("{down}.weight"), &[*width, hidden_size]);
            expect(&format!("{down}.bias"), &[*width]);
            expect("adapter_up.weight", &[hidden_size, *width]);
            expect("adapter_up.bias", &[hidden_size]);
            if let Some(size) = scaling_size(settings.scaling, hidden_size) {
                expect("scaling", &[size]);
            }
        }
        // Compared before anything is allocated from the widths that the settings claim.
        let file = files::AdapterFile::open_as(folder, &Base::from(model), &files::ADAPTER_HUB, &shapes)?;
        let adapter = Self::assemble(config, model, planned)?;
        file.read_into(adapter.entries())?;
        Ok(adapter)
    }

    fn plan(config: &BottleneckConfig, model: &CausalLm) -> Result<Vec<Planned>> {
        let settings = config.resolved();
        let (num_layers, hidden_size) = (model.config().num_layers as usize, model.config().hidden_size);
        let mut faults = Vec::new();
        if let Some(layer) = config.leave_out.iter().find(|layer| **layer >= num_layers as i64) {
            faults.push(format!("`leave_out` has {layer}, expected a layer of the model, which has {num_layers}"));
        }
        let mut planned = Vec::new();
        let places = [
            (Branch::Attention, "attention_adapters", settings.mh_adapter),
            (Branch::Mlp, "output_adapters", settings.output_adapter),
        ];
        for layer in (0..num_layers).filter(|layer| !config.leave_out.contains(&(*layer as i64))) {
            let Some(width) = settings.width(layer, hidden_size) else {
                faults.push(format!("`reduction_factor` has neither {layer} nor `default`, expected one of them"));
                continue;
            };
            for (branch, place, _) in places.iter().filter(|(.., is_on)| *is_on) {
                let path = format!("{}.{place}.adapters.{}", layer_path(model, layer), config.name);
                planned.push(Planned { layer, branch: *branch, path, width });
            }
        }
        if planned.is_empty() && faults.is_empty() {
            faults.push("`leave_out` has every layer, expected one that is not".into());
        }
        if faults.is_empty() { Ok(planned) } else { Err(PeftError::Config { faults }) }
    }

    /// The adapter with zero weights.
    fn assemble(config: BottleneckConfig, model: &CausalLm, planned: Vec<Planned>) -> Result<Self> {
        let settings = config.resolved();
        let hidden_size = model.config().hidden_size;
        let leaf = |size: &[i64], value: f64| -> Result<Tensor> {
            Ok(Tensor::f_full(size, value, (Kind::Float, model.device()))?.set_requires_grad(true))
        };
        let norm = |is_there: bool| -> Result<Option<Affine>> {
            let norm = || Ok(Affine { weight: leaf(&[hidden_size], 1.0)?, bias: leaf(&[hidden_size], 0.0)? });
            is_there.then(norm).transpose()
        };
        let mut layers: Vec<[Option<Bottleneck>; 2]> =
            (0..model.config().num_layers).map(|_| [const { None }; 2]).collect();
        for Planned { layer, branch, path, width } in planned {
            let size = scaling_size(settings.scaling, hidden_size);
            layers[layer][branch as usize] = Some(Bottleneck {
                path,
                norm_before: norm(settings.ln_before)?,
                down: Affine { weight: leaf(&[width, hidden_size], 0.0)?, bias: leaf(&[width], 0.0)? },
                up: Affine { weight: leaf(&[hidden_size, width], 0.0)?, bias: leaf(&[hidden_size], 0.0)? },
                norm_after: norm(settings.ln_after)?,
                scaling: size.map(|size| leaf(&[size], 1.0)).transpose()?,
            });
        }
        Ok(Self { config, settings, layers, facts: ModelFacts::of(model), state: State::new() })
    }

    fn entries(&self) -> Vec<files::Entry> {
        self.layers.iter().flatten().flatten().flat_map(Bottleneck::entries).collect()
    }

    /// The settings.
    pub fn config(&self) -> &BottleneckConfig {
        &self.config
    }
}

/// Numbers of a trained scaling.
fn scaling_size(scaling: Scaling, hidden_size: i64) -> Option<i64> {
    match scaling {
        Scaling::Number(_) => None,
        Scaling::Trained(TrainedScaling::Learned) => Some(1),
        Scaling::Trained(TrainedScaling::Channel) => Some(hidden_size),
    }
}

impl Sites for BottleneckAdapter {
    fn branch(&self, site: &BranchSite<'_>, output: Tensor) -> pt_model::Result<Tensor> {
        let bottleneck = self.layers.get(site.layer).and_then(|branches| branches[site.branch as usize].as_ref());
        let Some(bottleneck) = bottleneck.filter(|_| self.state.is_live()) else { return Ok(output) };
        let dropout = if self.state.is_training.get() { self.config.dropout } else { 0.0 };
        bottleneck.forward(site.residual, output, &self.settings, dropout).map_err(to_model)
    }

    fn set_training(&self, is_training: bool) -> bool {
        self.state.is_training.replace(is_training)
    }
}

impl Adapter for BottleneckAdapter {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        let all = self.layers.iter().flatten().flatten();
        all.flat_map(Bottleneck::tensors).map(|(name, tensor)| (name, tensor.shallow_clone())).collect()
    }

    fn set_enabled(&self, is_enabled: bool) {
        self.state.is_enabled.set(is_enabled);
    }

    fn save(&self, folder: &Path) -> Result<()> {
        files::save_as(
            folder,
            &files::ADAPTER_HUB,
            &self.config.to_adapter_hub_text(&self.facts),
            self.entries(),
            &files::Card {
                base: self.config.base_model_name_or_path.as_deref(),
                tag: "adapterhub",
                title: "Bottleneck adapter",
                settings: format!(
                    "{} of them, called `{}`",
                    self.layers.iter().flatten().flatten().count(),
                    self.config.name
                ),
            },
        )
    }

    fn merge_into(&self, _model: &mut CausalLm) -> Result<()> {
        Err(PeftError::NotMergeable {
            method: "a bottleneck adapter",
            reason: "it is a network of its own after or beside the layers, no change of their weights",
        })
    }

    fn unmerge_from(&self, _model: &mut CausalLm) -> Result<()> {
        Err(PeftError::State("the adapter is not merged".into()))
    }
}
