"""Doors outside the package: conversion of models."""
