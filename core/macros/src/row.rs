//! `#[derive(Row)]`.

use proc_macro2::TokenStream;
use quote::{format_ident, quote, quote_spanned};
use syn::ext::IdentExt;
use syn::meta::ParseNestedMeta;
use syn::spanned::Spanned;
use syn::{Data, DeriveInput, Error, Field, Fields, FieldsNamed, Ident, Type};

use crate::support::{Mistakes, core_path, is_snake_case, refuse_generics};

/// Most columns of a key: `RowKey` is implemented for tuples of so many values.
const KEY_COLUMNS_MAX: usize = 4;
/// Longest name of a column, in bytes: databases cut at 63, and indexes are named after columns.
const NAME_BYTES_MAX: usize = 50;

pub(crate) fn expand(input: &DeriveInput) -> Result<TokenStream, Error> {
    let core = core_path()?;
    let columns = columns_of(fields_of(input)?)?;
    let keys = key_columns(input, &columns)?;

    let struct_name = &input.ident;
    let constants = columns.iter().map(|column| column.constant(&core));
    let normalized = columns.iter().map(|column| column.normalize(&core));
    let entries = check_entries(&columns, &keys, &core);
    let values = columns.iter().map(|column| column.write(&core));
    let fields = columns.iter().map(|column| column.read(&core));
    let visibility = &input.vis;
    let is_found_by = |column: &Column<'_>| column.is_index || (column.is_key && keys.len() == 1);
    let indexed = columns.iter().enumerate().filter(|(_, column)| is_found_by(column));
    let indexed = indexed.map(|(place, Column { field, ty, .. })| {
        let docs = format!("The column `{field}`, for conditions on rows.");
        quote! {
            #[doc = #docs]
            #visibility const #field: #core::row::IndexedColumn<Self, #ty> =
                #core::row::IndexedColumn::at(#place);
        }
    });
    let stream_key = keys.iter().find(|key| key.is_stream).map(|Column { ty, .. }| {
        quote_spanned! {ty.span()=>
            const STREAM_KEY: ::core::option::Option<fn(&str) -> Self::Key> =
                ::core::option::Option::Some(|id| <#ty as ::core::convert::From<&str>>::from(id));
        }
    });
    let (key_type, key) = key_of(&keys);
    let keys_are_present = keys.iter().map(|Column { ty, .. }| {
        quote_spanned! {ty.span()=>
            const _: () = assert!(
                !<#ty as #core::row::ColumnValue>::NULLABLE,
                "the key of a row is always present: it cannot be an Option"
            );
        }
    });
    let merge = merge(&columns, &core).map(|fields| {
        quote! {
            #[automatically_derived]
            impl #core::row::Merge for #struct_name {
                fn merge(self, other: Self) -> Self {
                    Self { #(#fields),* }
                }
            }
        }
    });
    Ok(quote! {
        #[automatically_derived]
        impl #core::row::Row for #struct_name {
            type Key = #key_type;

            const COLUMNS: &'static [#core::row::Column] = &[#(#constants),*];

            #stream_key

            fn key(&self) -> Self::Key {
                #key
            }

            fn normalize(self) -> ::core::result::Result<Self, #core::row::InvalidValue> {
                let row = Self { #(#normalized),* };
                #entries
                ::core::result::Result::Ok(row)
            }

            fn into_values(
                self,
            ) -> ::core::result::Result<::std::vec::Vec<#core::row::Value>, #core::row::InvalidValue> {
                ::core::result::Result::Ok(::std::vec![#(#values),*])
            }

            fn from_values(
                values: ::std::vec::Vec<#core::row::Value>,
            ) -> ::core::result::Result<Self, #core::row::InvalidValue> {
                let mut values = #core::row::derived::Values::<Self>::new(values)?;
                ::core::result::Result::Ok(Self { #(#fields),* })
            }
        }

        #[automatically_derived]
        #[allow(dead_code, non_upper_case_globals)]
        impl #struct_name {
            #(#indexed)*
        }

        #merge

        #(#keys_are_present)*
    })
}

/// Returns the type of the key, and the expression of its value.
fn key_of(keys: &[&Column<'_>]) -> (TokenStream, TokenStream) {
    let types = keys.iter().map(|key| key.ty);
    let values =
        keys.iter().map(|Column { field, .. }| quote!(::core::clone::Clone::clone(&self.#field)));
    match keys {
        [_] => (quote!(#(#types)*), quote!(#(#values)*)),
        _ => (quote!((#(#types),*)), quote!((#(#values),*))),
    }
}

/// Checks the lengths of index entries: the entry of the key, and entries of an indexed column and the key.
fn check_entries(columns: &[Column<'_>], keys: &[&Column<'_>], core: &TokenStream) -> TokenStream {
    let part = |column: &Column<'_>| {
        let (field, name, text) = (column.field, &column.name, column.in_trait(core, "text"));
        quote!((#name, #text(&row.#field)))
    };
    let key = keys.iter().map(|key| part(key));
    let key = quote!(#(#key),*);
    let indexed = columns.iter().filter(|column| column.is_index).map(part);
    let check = quote!(#core::row::derived::check_index_entry);
    quote! {
        #check(&[#key])?;
        #(#check(&[#indexed, #key])?;)*
    }
}

/// Returns the fields of a merged row, unless a column has no role in merging, or none but the key is there.
fn merge(columns: &[Column<'_>], core: &TokenStream) -> Option<Vec<TokenStream>> {
    columns.iter().find(|column| !column.is_key)?;
    columns.iter().map(|column| column.merged(core)).collect()
}

fn fields_of(input: &DeriveInput) -> Result<&FieldsNamed, Error> {
    refuse_generics(input, "a row")?;
    match &input.data {
        Data::Struct(data) => match &data.fields {
            Fields::Named(fields) => Ok(fields),
            _ => Err(Error::new_spanned(
                &input.ident,
                "the fields of a row need names: each is a column",
            )),
        },
        _ => Err(Error::new_spanned(
            &input.ident,
            "a row is a struct with a named field for every column",
        )),
    }
}

/// One field and what its attributes say.
struct Column<'a> {
    field: &'a Ident,
    ty: &'a Type,
    name: String,
    is_key: bool,
    /// The key is the id of the stream.
    is_stream: bool,
    is_index: bool,
    is_json: bool,
    merge: Option<MergeRole>,
}

/// The part of a column in merging rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MergeRole {
    Sum,
    Min,
    Max,
}

fn columns_of(fields: &FieldsNamed) -> Result<Vec<Column<'_>>, Error> {
    let mut mistakes = Mistakes::default();
    let mut columns = Vec::new();
    for field in &fields.named {
        match Column::parse(field) {
            Ok(column) => columns.push(column),
            Err(error) => mistakes.add(error),
        }
    }
    mistakes.into_result().map(|()| columns)
}

fn key_columns<'a, 'b>(
    input: &DeriveInput,
    columns: &'a [Column<'b>],
) -> Result<Vec<&'a Column<'b>>, Error> {
    let keys: Vec<_> = columns.iter().filter(|column| column.is_key).collect();
    let mistake = match keys.as_slice() {
        [] => {
            let message = "no field identifies the row: mark one with #[row(key)]";
            return Err(Error::new_spanned(&input.ident, message));
        }
        [_] => None,
        [_, .., last] if keys.len() > KEY_COLUMNS_MAX => {
            Some((*last, format!("a key has at most {KEY_COLUMNS_MAX} columns")))
        }
        several => several.iter().find(|key| key.is_stream).map(|stream| {
            let mistake = format!(
                "a key with #[row(stream)] is the id of the stream and nothing else: write #[row(key)] on `{}`, \
                 implement `keys`, and set `SHARED` to false",
                stream.name
            );
            (*stream, mistake)
        }),
    };
    match mistake {
        Some((column, mistake)) => Err(Error::new_spanned(column.field, mistake)),
        None => Ok(keys),
    }
}

impl<'a> Column<'a> {
    fn parse(field: &'a Field) -> Result<Self, Error> {
        let attributes = &field.attrs;
        let ident = field.ident.as_ref().expect("named fields have names");
        let name = ident.unraw().to_string();
        if let Some(mistake) = name_mistake(&name) {
            return Err(Error::new_spanned(ident, mistake));
        }
        let (field, ty) = (ident, &field.ty);
        let (is_key, is_stream, is_index, is_json, merge) = (false, false, false, false, None);
        let mut column = Self { field, ty, name, is_key, is_stream, is_index, is_json, merge };
        for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("row")) {
            attribute.parse_nested_meta(|meta| {
                match () {
                    () if meta.path.is_ident("key") => column.is_key = true,
                    () if meta.path.is_ident("stream") => {
                        (column.is_stream, column.is_key) = (true, true);
                    }
                    () if meta.path.is_ident("index") => column.is_index = true,
                    () if meta.path.is_ident("json") => column.is_json = true,
                    () => {
                        let merge = MergeRole::parse(&meta)?;
                        if column.merge.replace(merge).is_some_and(|other| other != merge) {
                            return Err(meta.error("a column has one of `sum`, `min` and `max`"));
                        }
                    }
                }
                Ok(())
            })?;
        }
        if column.is_stream && !is_string(ty) {
            let mistake = "the key with #[row(stream)] is the id of a stream: its type is `String`";
            return Err(Error::new_spanned(ty, mistake));
        }
        match column.contradiction() {
            Some(mistake) => Err(Error::new_spanned(ident, mistake)),
            None => Ok(column),
        }
    }

    fn contradiction(&self) -> Option<&'static str> {
        match (self.is_key, self.is_index, self.is_json) {
            (true, _, true) => Some("a key is compared and cannot be json"),
            (_, true, true) => Some("json cannot be searched by: index a field of its own"),
            (true, true, _) => Some("the key is indexed already: remove `index`"),
            (true, ..) if self.merge.is_some() => {
                Some("rows of one key are merged, so the key has neither `sum` nor `min` nor `max`")
            }
            (_, _, true) if self.merge.is_some() => {
                Some("json can be neither summed nor compared: give the value a field of its own")
            }
            _ => None,
        }
    }

    fn constant(&self, core: &TokenStream) -> TokenStream {
        let name = &self.name;
        let role = match (self.is_key, self.is_index) {
            (true, _) => quote!(Key),
            (_, true) => quote!(Index),
            _ => quote!(Plain),
        };
        let (kind, nullable) = if self.is_json {
            (quote!(#core::row::ColumnKind::Json), quote!(false))
        } else {
            (self.in_trait(core, "KIND"), self.in_trait(core, "NULLABLE"))
        };
        let merge = match self.merge {
            Some(merge) => {
                let merge = merge.ident();
                quote!(::core::option::Option::Some(#core::row::MergeRole::#merge))
            }
            None => quote!(::core::option::Option::None),
        };
        quote! {
            #core::row::Column {
                name: #name,
                kind: #kind,
                nullable: #nullable,
                role: #core::row::ColumnRole::#role,
                merge: #merge,
            }
        }
    }

    /// Returns the field of a merged row; `None` for a column without a role in merging.
    fn merged(&self, core: &TokenStream) -> Option<TokenStream> {
        let (field, name, ty) = (self.field, &self.name, self.ty);
        if self.is_key {
            return Some(quote!(#field: self.#field));
        }
        let both = quote!(self.#field, other.#field);
        Some(match self.merge? {
            MergeRole::Sum => {
                quote_spanned!(ty.span()=> #field: #core::row::derived::sum::<#ty>(#name, #both))
            }
            MergeRole::Min => {
                quote_spanned!(ty.span()=> #field: <#ty as #core::row::Ordered>::least(#both))
            }
            MergeRole::Max => {
                quote_spanned!(ty.span()=> #field: <#ty as #core::row::Ordered>::greatest(#both))
            }
        })
    }

    fn normalize(&self, core: &TokenStream) -> TokenStream {
        let (field, name) = (self.field, &self.name);
        if self.is_json {
            quote!(#field: #core::row::derived::normalize_json(#name, &self.#field)?)
        } else {
            let normalize = self.in_trait(core, "normalize");
            quote!(#field: #core::row::derived::named(#name, #normalize(self.#field))?)
        }
    }

    fn write(&self, core: &TokenStream) -> TokenStream {
        let (field, name) = (self.field, &self.name);
        if self.is_json {
            quote!(#core::row::derived::into_json(#name, &self.#field)?)
        } else {
            let into_value = self.in_trait(core, "into_value");
            quote!(#into_value(self.#field))
        }
    }

    fn read(&self, core: &TokenStream) -> TokenStream {
        let field = self.field;
        let from_value = if self.is_json {
            quote!(#core::row::derived::from_json)
        } else {
            self.in_trait(core, "from_value")
        };
        quote!(#field: values.take(#from_value)?)
    }

    /// An item of `ColumnValue`, spanned so that an unsuitable type is underlined where it stands.
    fn in_trait(&self, core: &TokenStream, item: &str) -> TokenStream {
        let ty = self.ty;
        let item = Ident::new(item, ty.span());
        quote_spanned!(ty.span()=> <#ty as #core::row::ColumnValue>::#item)
    }
}

impl MergeRole {
    fn parse(meta: &ParseNestedMeta<'_>) -> Result<Self, Error> {
        let all = [Self::Sum, Self::Min, Self::Max];
        let named = |role: &Self| meta.path.is_ident(&role.ident().to_string().to_lowercase());
        let expected = "expected `key`, `stream`, `index`, `json`, `sum`, `min` or `max`";
        all.into_iter().find(named).ok_or_else(|| meta.error(expected))
    }

    /// Returns the name of the variant of `kafold_core::row::MergeRole`.
    fn ident(self) -> Ident {
        format_ident!("{self:?}")
    }
}

/// Returns whether the type is written as `String`, by any path.
fn is_string(ty: &Type) -> bool {
    let Type::Path(path) = ty else { return false };
    path.path.segments.last().is_some_and(|last| last.ident == "String")
}

fn name_mistake(name: &str) -> Option<String> {
    if !is_snake_case(name) {
        return Some("a column's name is [a-z][a-z0-9_]*: rename the field".to_owned());
    }
    if name.len() > NAME_BYTES_MAX {
        let bytes = name.len();
        return Some(format!(
            "a column's name has at most {NAME_BYTES_MAX} bytes, this one has {bytes}"
        ));
    }
    name.starts_with("kafold_").then(|| "columns named kafold_… are the toolkit's own".to_owned())
}
