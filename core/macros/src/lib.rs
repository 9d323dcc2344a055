//! The derive macros of kafold-core, which re-exports them beside the traits: depend on that.
//!
//! - `domain_event`: `#[derive(DomainEvent)]`;
//! - `event_set`: `#[derive(EventSet)]`;
//! - `row`: `#[derive(Row)]`;
//! - `support`: what both need.

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

mod domain_event;
mod event_set;
mod row;
mod support;

/// Gives every variant of an enum a stable name and version: the type its events are stored under.
///
/// - `#[event("order.placed", version = 1)]` on each variant. The name is
///   `[a-z][a-z0-9_]*(\.[a-z0-9_]+)*` of at most 100 bytes, not `kafold` or below it, and unique in
///   the enum; the version counts from 1 and is 1 when left out.
/// - `#[event(category = "order")]` on the enum: the category of the streams that have these events, as
///   a literal or as `Order::CATEGORY`. Read models need it to tell events of other aggregates from
///   unknown events of this one.
/// - `#[event(ignore("order.noted", "order.archived"))]` on an enum which leaves out some events of its
///   category.
/// - `#[event(upcasters = path::to::function)]` on the enum, when events have had other shapes: a
///   `fn() -> Upcasters`.
///
/// The three may stand in one attribute, with commas between them.
///
/// The enum also derives `Serialize`, `Deserialize`, `Clone` and `Debug`, and keeps serde's default
/// representation; which field names a payload has is serde's business, which variant it is stands
/// in the type name.
#[proc_macro_derive(DomainEvent, attributes(event))]
pub fn derive_domain_event(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    domain_event::expand(&input).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// Makes an enum the events of several aggregates. Each variant holds the events of one: `Order(OrderEvent)`.
///
/// The events of each variant declare their category, and no two variants have the same. The enum also derives
/// `Clone` and `Debug`.
#[proc_macro_derive(EventSet)]
pub fn derive_event_set(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    event_set::expand(&input).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// Makes a struct the row of a read model: every field is a column of its name.
///
/// - `#[row(key)]` on one field, or on two to four: they identify the row and are no `Option`s;
/// - `#[row(stream)]` on a key of type `String` that is the id of the stream;
/// - `#[row(index)]` on fields that rows are searched by;
/// - `#[row(sum)]`, `#[row(min)]`, `#[row(max)]` on fields that are added up: a row whose fields, but the key, all
///   have one of them implements `Merge`;
/// - `#[row(json)]` on fields of any other type with serde, stored as JSON text. A value which JSON would
///   give back as another one is a fault of its event.
///
/// Field names are `[a-z][a-z0-9_]*` of at most 50 bytes and do not begin with `kafold_`. The struct
/// also derives `Clone` and `PartialEq`.
#[proc_macro_derive(Row, attributes(row))]
pub fn derive_row(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    row::expand(&input).unwrap_or_else(syn::Error::into_compile_error).into()
}
