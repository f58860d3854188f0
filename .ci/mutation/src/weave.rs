//! Writes changes into a file, each behind its switch.

use std::collections::HashMap;
use std::env;

use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::visit_mut::{self, VisitMut};
use syn::{Arm, Attribute, BinOp, Block, Expr, ExprStruct, Item, Meta, Token, parse_quote};

use crate::list::{Change, Place};

struct Weaver<'a> {
    changes: HashMap<Place, Vec<&'a Change>>,
    woven: Vec<u32>,
}

fn start(spanned: &impl Spanned) -> Place {
    let start = spanned.span().start();
    Place {
        line: start.line,
        column: start.column + 1,
    }
}

fn number(change: &Change) -> syn::LitInt {
    syn::LitInt::new(&change.number.to_string(), proc_macro2::Span::call_site())
}

impl Weaver<'_> {
    /// The changes of a genre at a place.
    fn at(&mut self, place: Place, genre: &str) -> Vec<Change> {
        let here = self.changes.get(&place).into_iter().flatten();
        let here: Vec<Change> = here
            .filter(|change| change.genre == genre)
            .map(|change| (*change).clone())
            .collect();
        self.woven.extend(here.iter().map(|change| change.number));
        here
    }

    fn body(&mut self, block: &mut Block) {
        let Some(first) = block.stmts.first() else { return };
        let place = start(first);
        for change in self.at(place, "FnValue") {
            let number = number(&change);
            let Ok(value) = syn::parse_str::<Expr>(&change.replacement) else {
                continue;
            };
            block
                .stmts
                .insert(0, parse_quote!(if crate::switch::on(#number) { return #value; }));
        }
    }
}

/// A `let` among conditions cannot go into a block of its own.
fn has_let(expr: &Expr) -> bool {
    match expr {
        Expr::Let(_) => true,
        Expr::Binary(binary) if matches!(binary.op, BinOp::And(_)) => {
            has_let(&binary.left) || has_let(&binary.right)
        }
        _ => false,
    }
}

/// Whether what has these attributes is compiled for the tests here.
fn is_compiled(attributes: &[Attribute]) -> bool {
    let conditions = attributes
        .iter()
        .filter(|attribute| attribute.path().is_ident("cfg"));
    let mut parsed = conditions.filter_map(|attribute| attribute.parse_args::<Meta>().ok());
    parsed.all(|condition| holds(&condition))
}

fn holds(condition: &Meta) -> bool {
    let inner = |list: &syn::MetaList| {
        list.parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated)
            .unwrap_or_default()
    };
    match condition {
        Meta::Path(path) => !path.is_ident("loom") && !path.is_ident("miri"),
        Meta::List(list) if list.path.is_ident("not") => !inner(list).iter().any(holds),
        Meta::List(list) if list.path.is_ident("any") => inner(list).iter().any(holds),
        Meta::List(list) => inner(list).iter().all(holds),
        Meta::NameValue(pair) => {
            let value = &pair.value;
            let text: String = quote::quote!(#value).to_string();
            let other = pair.path.is_ident("target_arch") && text.trim_matches('"') != env::consts::ARCH;
            !other && text != "\"fences\""
        }
    }
}

/// The lines that are compiled only elsewhere: another processor, the model checker.
#[derive(Default)]
struct Elsewhere(Vec<(usize, usize)>);

impl Elsewhere {
    fn look(&mut self, attributes: &[Attribute], spanned: &impl Spanned) {
        if !is_compiled(attributes) {
            self.0
                .push((spanned.span().start().line, spanned.span().end().line));
        }
    }
}

impl<'a> Visit<'a> for Elsewhere {
    fn visit_item(&mut self, item: &'a Item) {
        match item {
            Item::Fn(item) => self.look(&item.attrs, item),
            Item::Impl(item) => self.look(&item.attrs, item),
            Item::Mod(item) => self.look(&item.attrs, item),
            Item::Const(item) => self.look(&item.attrs, item),
            Item::Struct(item) => self.look(&item.attrs, item),
            _ => {}
        }
        visit::visit_item(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'a syn::ImplItemFn) {
        self.look(&item.attrs, item);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_expr(&mut self, expr: &'a Expr) {
        match expr {
            Expr::Block(block) => self.look(&block.attrs, block),
            Expr::ForLoop(each) => self.look(&each.attrs, each),
            Expr::Unsafe(block) => self.look(&block.attrs, block),
            Expr::Call(call) => self.look(&call.attrs, call),
            _ => {}
        }
        visit::visit_expr(self, expr);
    }
}

/// The changes of a file that this machine's compiler would see.
pub fn seen(text: &str, change: &Change) -> bool {
    let file = syn::parse_file(text).expect("the engine's sources are Rust");
    let mut elsewhere = Elsewhere::default();
    elsewhere.visit_file(&file);
    let line = change.start.line;
    !elsewhere.0.iter().any(|(from, to)| (*from..=*to).contains(&line))
}

impl VisitMut for Weaver<'_> {
    fn visit_item_fn_mut(&mut self, item: &mut syn::ItemFn) {
        visit_mut::visit_item_fn_mut(self, item);
        self.body(&mut item.block);
    }

    fn visit_impl_item_fn_mut(&mut self, item: &mut syn::ImplItemFn) {
        visit_mut::visit_impl_item_fn_mut(self, item);
        self.body(&mut item.block);
    }

    fn visit_trait_item_fn_mut(&mut self, item: &mut syn::TraitItemFn) {
        visit_mut::visit_trait_item_fn_mut(self, item);
        if let Some(block) = &mut item.default {
            self.body(block);
        }
    }

    fn visit_expr_mut(&mut self, expr: &mut Expr) {
        let before = expr.clone();
        visit_mut::visit_expr_mut(self, expr);
        match &before {
            Expr::Binary(binary) if !has_let(&before) => {
                for change in self.at(start(&binary.op), "BinaryOperator") {
                    let mut changed = binary.clone();
                    let Ok(op) = syn::parse_str::<BinOp>(&change.replacement) else {
                        continue;
                    };
                    changed.op = op;
                    let number = number(&change);
                    let (left, right, op) = (&changed.left, &changed.right, &changed.op);
                    *expr =
                        parse_quote!((if crate::switch::on(#number) { (#left) #op (#right) } else { #expr }));
                }
            }
            Expr::Unary(unary) => {
                for change in self.at(start(&unary.op), "UnaryOperator") {
                    let (number, inner) = (number(&change), &unary.expr);
                    *expr = parse_quote!((if crate::switch::on(#number) { #inner } else { #expr }));
                }
            }
            _ => {}
        }
    }

    fn visit_arm_mut(&mut self, arm: &mut Arm) {
        let place = start(&arm.pat);
        let guard_place = arm.guard.as_ref().map(|(_, guard)| start(guard));
        visit_mut::visit_arm_mut(self, arm);
        if let (Some(place), Some((_, guard))) = (guard_place, &mut arm.guard) {
            for change in self.at(place, "MatchArmGuard") {
                let (number, value) = (number(&change), syn::parse_str::<Expr>(&change.replacement));
                let Ok(value) = value else { continue };
                **guard = parse_quote!((if crate::switch::on(#number) { #value } else { #guard }));
            }
        }
        for change in self.at(place, "MatchArm") {
            let number = number(&change);
            let guard: Expr = match &arm.guard {
                Some((_, guard)) => parse_quote!(!crate::switch::on(#number) && (#guard)),
                None => parse_quote!(!crate::switch::on(#number)),
            };
            arm.guard = Some((Default::default(), Box::new(guard)));
        }
    }

    fn visit_expr_struct_mut(&mut self, expr: &mut ExprStruct) {
        let places: Vec<Place> = expr.fields.iter().map(start).collect();
        visit_mut::visit_expr_struct_mut(self, expr);
        let Some(rest) = expr.rest.clone() else { return };
        for (place, field) in places.into_iter().zip(&mut expr.fields) {
            for change in self.at(place, "StructField") {
                let (number, member, value) = (number(&change), &field.member, &field.expr);
                field.expr =
                    parse_quote!((if crate::switch::on(#number) { (#rest).#member } else { #value }));
                field.colon_token = Some(Default::default());
            }
        }
    }
}

/// The file with the changes in it, and the numbers of those that are.
pub fn weave(text: &str, changes: &[&Change]) -> (String, Vec<u32>) {
    let mut file = syn::parse_file(text).expect("the engine's sources are Rust");
    let mut places: HashMap<Place, Vec<&Change>> = HashMap::new();
    for change in changes {
        places.entry(change.start).or_default().push(change);
    }
    let mut weaver = Weaver {
        changes: places,
        woven: Vec::new(),
    };
    weaver.visit_file_mut(&mut file);
    (prettyplease::unparse(&file), weaver.woven)
}

/// The file with one change in its place, as it would be written by hand.
pub fn alone(text: &str, change: &Change) -> String {
    let offset = |place: Place| {
        let line: usize = text
            .split_inclusive('\n')
            .take(place.line - 1)
            .map(str::len)
            .sum();
        let rest = &text[line..];
        line + rest
            .char_indices()
            .nth(place.column - 1)
            .map_or(rest.len(), |(at, _)| at)
    };
    format!(
        "{}{}{}",
        &text[..offset(change.start)],
        change.replacement,
        &text[offset(change.end)..]
    )
}
