//! Several adapters over one model: active together, or one for each prompt of a batch.

use crate::adapter::Adapter;
use crate::error::to_model;
use crate::{PeftError, Result};
use pt_model::{Bare, BranchSite, GapSite, Linear, Past, Sites, TokenOrder, Tokens, VirtualTokens};
use pt_tensor::{Device, Tensor};
use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;

/// Named adapters over one model, of whatever methods and ranks.
///
/// Either the active ones act on every prompt, and where several are active they go around one another; or
/// [`set_routes`](Self::set_routes) gives each prompt of the next batches an adapter of its own, and the base product of a
/// layer is computed once for all of them. Adapters may be added, exchanged and taken away between two batches, while
/// the model's user holds the set.
#[derive(Debug, Default)]
pub struct AdapterSet {
    adapters: RefCell<Vec<Named>>,
    active: RefCell<Vec<String>>,
    /// By prompt of a batch: the adapter's name, or none for the bare model.
    routes: RefCell<Option<Vec<Option<String>>>>,
    is_disabled: Cell<bool>,
}

type Named = (String, Rc<dyn Adapter>);

impl AdapterSet {
    /// A set without adapters: the bare model.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an adapter, or exchanges the one of that name; the first one added becomes active.
    ///
    /// # Errors
    /// [`PeftError::State`] when the exchanged one is active and the new one replaces a parameter that another active
    /// one replaces too; the set is then as it was.
    pub fn insert(&self, name: impl Into<String>, adapter: Rc<dyn Adapter>) -> Result<()> {
        let name = name.into();
        let mut adapters = self.adapters.borrow().clone();
        match adapters.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = adapter,
            None => {
                if adapters.is_empty() {
                    *self.active.borrow_mut() = vec![name.clone()];
                }
                adapters.push((name, adapter));
            }
        }
        check_conflicts(&chosen(&adapters, &self.active.borrow())?)?;
        *self.adapters.borrow_mut() = adapters;
        Ok(())
    }

    /// Takes an adapter away, from the active ones too; returns it.
    ///
    /// # Errors
    /// [`PeftError::UnknownAdapter`].
    pub fn remove(&self, name: &str) -> Result<Rc<dyn Adapter>> {
        let adapter = self.get(name)?;
        self.adapters.borrow_mut().retain(|(known, _)| known != name);
        self.active.borrow_mut().retain(|known| known != name);
        Ok(adapter)
    }

    /// Names of all adapters, in the order they came.
    pub fn names(&self) -> Vec<String> {
        self.adapters.borrow().iter().map(|(name, _)| name.clone()).collect()
    }

    /// Names of the active adapters.
    pub fn active(&self) -> Vec<String> {
        self.active.borrow().clone()
    }

    /// An adapter by its name.
    ///
    /// # Errors
    /// [`PeftError::UnknownAdapter`].
    pub fn get(&self, name: &str) -> Result<Rc<dyn Adapter>> {
        Ok(find(&self.adapters.borrow(), name)?.1)
    }

    /// Chooses the active adapters; no name at all is the bare model.
    ///
    /// # Errors
    /// [`PeftError::UnknownAdapter`]; [`PeftError::State`] when two of them replace the same parameter.
    pub fn set_active(&self, names: &[&str]) -> Result<()> {
        let mut active: Vec<String> = Vec::new();
        for name in names {
            if !active.iter().any(|known| known == name) {
                active.push((*name).to_string());
            }
        }
        check_conflicts(&chosen(&self.adapters.borrow(), &active)?)?;
        *self.active.borrow_mut() = active;
        Ok(())
    }

    /// Gives prompt p of the next batches the adapter `names[p]`, or the bare model; until
    /// [`clear_routes`](Self::clear_routes), the active adapters then do not matter.
    ///
    /// # Errors
    /// [`PeftError::UnknownAdapter`].
    pub fn set_routes(&self, names: &[Option<&str>]) -> Result<()> {
        for name in names.iter().flatten() {
            self.get(name)?;
        }
        *self.routes.borrow_mut() = Some(names.iter().map(|name| name.map(Into::into)).collect());
        Ok(())
    }

    /// Lets the active adapters act on every prompt again.
    pub fn clear_routes(&self) {
        *self.routes.borrow_mut() = None;
    }

    /// Switches all adapters on or off together; off, the set is the bare model.
    pub fn set_enabled(&self, is_enabled: bool) {
        self.is_disabled.set(!is_enabled);
    }

    fn live(&self) -> Result<Vec<Rc<dyn Adapter>>> {
        if self.is_disabled.get() {
            return Ok(vec![]);
        }
        Ok(chosen(&self.adapters.borrow(), &self.active.borrow())?.into_iter().map(|(_, adapter)| adapter).collect())
    }
}

fn find(adapters: &[Named], name: &str) -> Result<Named> {
    let found = adapters.iter().find(|(known, _)| known == name).cloned();
    found.ok_or_else(|| PeftError::UnknownAdapter {
        name: name.into(),
        available: adapters.iter().map(|(name, _)| name.clone()).collect(),
    })
}

fn chosen(adapters: &[Named], names: &[String]) -> Result<Vec<Named>> {
    names.iter().map(|name| find(adapters, name)).collect()
}

/// No parameter can be replaced by two adapters that are active together.
fn check_conflicts(chosen: &[Named]) -> Result<()> {
    let mut replaced: Vec<(&str, &str)> = Vec::new();
    for (name, adapter) in chosen {
        for parameter in adapter.replaced_parameters() {
            if let Some((_, other)) = replaced.iter().find(|(known, _)| *known == parameter) {
                return Err(PeftError::State(format!("`{other}` and `{name}` both replace `{parameter}`")));
            }
            replaced.push((parameter, name));
        }
    }
    Ok(())
}

/// Whether an adapter replaces the weight of a layer, or has an update on the output layer: only one of the active may.
fn replaces(adapter: &dyn Adapter, layer: &Linear) -> bool {
    let weight = format!("{}.weight", layer.path);
    adapter.replaced_parameters().contains(&weight.as_str())
}

/// The last of `others` around those before it, around `base` on the layer itself.
fn nested(base: &dyn Adapter, others: &[Rc<dyn Adapter>], layer: &Linear, hidden_states: &Tensor) -> Result<Tensor> {
    match others.split_last() {
        None => Ok(base.linear(layer, hidden_states)?),
        Some((outer, inner)) => {
            outer.around_linear(layer, hidden_states, &|hidden_states| nested(base, inner, layer, hidden_states))
        }
    }
}

impl Sites for AdapterSet {
    fn linear(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<Tensor> {
        let mut live = self.live().map_err(to_model)?;
        // An adapter that replaces the weight has to come first: the others go around what it gives.
        if let Some(first) = live.iter().position(|adapter| replaces(adapter.as_ref(), layer)) {
            live[..=first].rotate_right(1);
        }
        let Some((base, others)) = live.split_first() else { return layer.forward(hidden_states) };
        nested(base.as_ref(), others, layer, hidden_states).map_err(to_model)
    }

    fn output(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<(Tensor, Tensor)> {
        let live = self.live().map_err(to_model)?;
        match live.iter().find(|adapter| replaces(adapter.as_ref(), layer)) {
            Some(adapter) => adapter.output(layer, hidden_states),
            None => Bare.output(layer, hidden_states),
        }
    }

    fn embedding(&self, input_ids: &Tensor, embeddings: Tensor) -> pt_model::Result<Tensor> {
        let live = self.live().map_err(to_model)?;
        live.iter().try_fold(embeddings, |embeddings, adapter| adapter.embedding(input_ids, embeddings))
    }

    fn branch(&self, site: &BranchSite<'_>, output: Tensor) -> pt_model::Result<Tensor> {
        let live = self.live().map_err(to_model)?;
        live.iter().try_fold(output, |output, adapter| adapter.branch(site, output))
    }

    fn gap(&self, site: &GapSite<'_>, hidden_states: Tensor) -> pt_model::Result<Tensor> {
        let live = self.live().map_err(to_model)?;
        live.iter().try_fold(hidden_states, |hidden_states, adapter| adapter.gap(site, hidden_states))
    }

    fn num_virtual_tokens(&self) -> usize {
        if let Some(routes) = self.routes.borrow().as_ref().filter(|_| !self.is_disabled.get()) {
            // Of a batch all prompts have the same, or none has any: see `Routed::plan`.
            let routed = routes.iter().flatten().filter_map(|name| self.get(name).ok());
            return routed.map(|adapter| adapter.num_virtual_tokens()).max().unwrap_or(0);
        }
        self.live().map_or(0, |live| live.iter().map(|adapter| adapter.num_virtual_tokens()).sum())
    }

    fn virtual_tokens(&self) -> pt_model::Result<Option<VirtualTokens>> {
        // Only one of the active ones has any: see `Adapter::replaced_parameters`.
        let live = self.live().map_err(to_model)?;
        live.iter().find_map(|adapter| adapter.virtual_tokens().transpose()).transpose()
    }

    fn parameter(&self, path: &str) -> Option<Tensor> {
        self.live().ok()?.iter().find_map(|adapter| adapter.parameter(path))
    }

    fn routed(&self, prompt_of_token: &[usize]) -> pt_model::Result<Option<Rc<dyn Sites>>> {
        let routes = self.routes.borrow();
        match routes.as_ref().filter(|_| !self.is_disabled.get()) {
            None => Ok(None),
            Some(routes) => Routed::plan(&self.adapters.borrow(), routes, prompt_of_token).map(Some).map_err(to_model),
        }
    }

    fn set_training(&self, is_training: bool) -> bool {
        // Each is switched, active or not, so no `any` that ends early.
        self.adapters.borrow().iter().fold(false, |was, (_, adapter)| adapter.set_training(is_training) | was)
    }
}

/// The tokens of one run, by the adapter that acts on them.
#[derive(Debug)]
struct Routed {
    parts: Vec<Part>,
    /// Where each token stands in the parts laid end to end, `[tokens]`; none where that is the order of the tokens.
    order: Option<Tensor>,
    num_tokens: i64,
    /// What a site that cannot fail found, for the next that can.
    fault: RefCell<Option<PeftError>>,
}

#[derive(Debug)]
struct Part {
    name: Option<String>,
    adapter: Option<Rc<dyn Adapter>>,
    /// Its tokens, `[n]`.
    tokens: Tensor,
    /// How the tokens of the run follow each other, and with this part's as those of the pass.
    order: RefCell<Option<(Rc<TokenOrder>, Rc<TokenOrder>)>>,
}

impl Routed {
    /// Sites for these tokens: an adapter's own, where all have the same.
    fn plan(adapters: &[Named], routes: &[Option<String>], prompt_of_token: &[usize]) -> Result<Rc<dyn Sites>> {
        let mut by_name: Vec<(Option<&String>, Vec<i64>)> = Vec::new();
        for (token, &prompt) in prompt_of_token.iter().enumerate() {
            let name = routes.get(prompt).ok_or_else(|| {
                PeftError::State(format!("the batch has a prompt {prompt}, and routes were set for {}", routes.len()))
            })?;
            let token = token as i64;
            match by_name.iter_mut().find(|(known, _)| *known == name.as_ref()) {
                Some((_, tokens)) => tokens.push(token),
                None => by_name.push((name.as_ref(), vec![token])),
            }
        }
        let adapter_of = |name: Option<&String>| -> Result<Option<Rc<dyn Adapter>>> {
            name.map(|name| Ok(find(adapters, name)?.1)).transpose()
        };
        if let [(name, _)] = by_name.as_slice() {
            return Ok(match adapter_of(*name)? {
                Some(adapter) => adapter,
                None => Rc::new(Bare),
            });
        }
        for (name, _) in &by_name {
            if adapter_of(*name)?.is_some_and(|adapter| adapter.num_virtual_tokens() > 0) {
                let name = name.map_or("", String::as_str);
                return Err(PeftError::State(format!(
                    "`{name}` brings virtual tokens, which stand before every sequence of a batch: route all prompts of \
                     the batch to it, or none"
                )));
            }
        }
        let laid: Vec<i64> = by_name.iter().flat_map(|(_, tokens)| tokens).copied().collect();
        let mut order = vec![0; laid.len()];
        laid.iter().enumerate().for_each(|(place, &token)| order[token as usize] = place as i64);
        let order = (!laid.is_sorted()).then(|| Tensor::from_slice(&order));
        let parts = by_name
            .into_iter()
            .map(|(name, tokens)| {
                Ok(Part {
                    name: name.cloned(),
                    adapter: adapter_of(name)?,
                    tokens: Tensor::from_slice(&tokens),
                    order: RefCell::default(),
                })
            })
            .collect::<Result<_>>()?;
        Ok(Rc::new(Self { parts, order, num_tokens: laid.len() as i64, fault: RefCell::new(None) }))
    }

    /// One value for each token, `[tokens, ..]`, from what `of_part` gives for each part's.
    fn by_part(
        &self,
        values: &Tensor,
        mut of_part: impl FnMut(&Part, Tensor) -> Result<Tensor>,
    ) -> pt_model::Result<Tensor> {
        let mut run = || -> Result<Tensor> {
            if let Some(fault) = self.fault.take() {
                return Err(fault);
            }
            if values.size().first() != Some(&self.num_tokens) {
                let found = values.size();
                return Err(PeftError::State(format!("routes for {} tokens met {found:?}", self.num_tokens)));
            }
            let parts = self.parts.iter().map(|part| of_part(part, part.rows(values)?)).collect::<Result<Vec<_>>>()?;
            let laid = Tensor::f_cat(&parts, 0)?;
            Ok(match &self.order {
                Some(order) => laid.f_index_select(0, &order.to_device(laid.device()))?,
                None => laid,
            })
        };
        run().map_err(to_model)
    }
}

impl Part {
    fn rows(&self, values: &Tensor) -> Result<Tensor> {
        let tokens = if values.device() == Device::Cpu {
            self.tokens.shallow_clone()
        } else {
            self.tokens.to_device(values.device())
        };
        Ok(values.f_index_select(0, &tokens)?)
    }
}

/// A part's tokens among those of the whole run.
struct PartTokens<'a> {
    part: &'a Part,
    whole: &'a GapSite<'a>,
}

impl Tokens for PartTokens<'_> {
    fn past(&self, layer: usize, _input: &Tensor, reach: usize) -> pt_model::Result<Past> {
        let Past { rows, order } = self.whole.tokens.past(layer, self.whole.input, reach)?;
        let mut known = self.part.order.borrow_mut();
        if let Some((_, own)) = known.as_ref().filter(|(of, _)| Rc::ptr_eq(of, &order)) {
            return Ok(Past { rows, order: own.clone() });
        }
        let tokens = Vec::<i64>::try_from(&self.part.tokens)?.into_iter().map(|token| token as usize);
        let own = tokens.map(|token| order.own.as_ref().map_or(token, |rows| rows[token])).collect();
        let own = Rc::new(TokenOrder { own: Some(own), ..(*order).clone() });
        *known = Some((order, own.clone()));
        Ok(Past { rows, order: own })
    }
}

impl Sites for Routed {
    fn linear(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<Tensor> {
        // The base product of all tokens, computed where the first adapter asks for it.
        let whole = OnceCell::new();
        self.by_part(hidden_states, |part, own| {
            let base = |input: &Tensor| -> Result<Tensor> {
                // An adapter that changes the input has to have a product of its own.
                if !std::ptr::eq(input, &own) {
                    return Ok(layer.forward(input)?);
                }
                if whole.get().is_none() {
                    let _ = whole.set(layer.forward(hidden_states)?);
                }
                whole.get().map_or_else(|| Ok(layer.forward(input)?), |whole| part.rows(whole))
            };
            match &part.adapter {
                None => base(&own),
                Some(adapter) if replaces(adapter.as_ref(), layer) => Ok(adapter.linear(layer, &own)?),
                Some(adapter) => adapter.around_linear(layer, &own, &base),
            }
        })
    }

    fn output(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<(Tensor, Tensor)> {
        if let Some(fault) = self.fault.take() {
            return Err(to_model(fault));
        }
        let is_changed = |part: &&Part| part.adapter.as_ref().is_some_and(|adapter| replaces(adapter.as_ref(), layer));
        match self.parts.iter().find(is_changed) {
            None => Bare.output(layer, hidden_states),
            Some(part) => Err(to_model(alone(part, "the output layer"))),
        }
    }

    fn embedding(&self, input_ids: &Tensor, embeddings: Tensor) -> pt_model::Result<Tensor> {
        self.by_part(&embeddings, |part, own| match &part.adapter {
            None => Ok(own),
            Some(adapter) => Ok(adapter.embedding(&part.rows(input_ids)?, own)?),
        })
    }

    fn branch(&self, site: &BranchSite<'_>, output: Tensor) -> pt_model::Result<Tensor> {
        self.by_part(&output, |part, own| match &part.adapter {
            None => Ok(own),
            Some(adapter) => {
                let (residual, input) = (part.rows(site.residual)?, part.rows(site.input)?);
                Ok(adapter.branch(&BranchSite { residual: &residual, input: &input, ..*site }, own)?)
            }
        })
    }

    fn gap(&self, site: &GapSite<'_>, hidden_states: Tensor) -> pt_model::Result<Tensor> {
        self.by_part(&hidden_states, |part, own| match &part.adapter {
            None => Ok(own),
            Some(adapter) => {
                let (input, tokens) = (part.rows(site.input)?, PartTokens { part, whole: site });
                Ok(adapter.gap(&GapSite { input: &input, tokens: &tokens, ..*site }, own)?)
            }
        })
    }

    fn parameter(&self, path: &str) -> Option<Tensor> {
        let has = |part: &&Part| part.adapter.as_ref().is_some_and(|adapter| adapter.parameter(path).is_some());
        if let Some(part) = self.parts.iter().find(has) {
            *self.fault.borrow_mut() = Some(alone(part, path));
        }
        None
    }

    fn check(&self) -> pt_model::Result<()> {
        self.fault.take().map_or(Ok(()), |fault| Err(to_model(fault)))
    }
}

/// The error for an adapter that changes what all prompts of a batch share.
fn alone(part: &Part, what: &str) -> PeftError {
    let name = part.name.as_deref().unwrap_or_default();
    PeftError::State(format!(
        "`{name}` replaces {what}, which the prompts of a batch share: give it batches of its own"
    ))
}
